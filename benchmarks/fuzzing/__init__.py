"""Bad input on purpose: valid calls with one argument replaced, and what came of each."""
