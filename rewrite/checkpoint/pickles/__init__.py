"""A pickle as inert data, its names judged, and then its objects built by code of this package."""
