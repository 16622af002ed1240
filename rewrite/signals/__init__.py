"""Signal propagation: activations, gradients and Jacobians by depth."""
