"""Bridges to other packages, one module each; importing this imports none of them."""
