"""Commands around the package; each is started as a script."""
