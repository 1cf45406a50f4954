"""Scripts to copy from. A package, so that they import each other and run as `python -m examples.<name>`."""
