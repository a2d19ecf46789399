"""Operator rules, one family a file; the only place in the package that knows an operator."""
