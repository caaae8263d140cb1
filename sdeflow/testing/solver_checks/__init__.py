"""What `check_solver` holds a solver to: one module a group of identities, and what they share."""
