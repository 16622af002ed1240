"""Inputs of models that say in a configuration what they take."""
