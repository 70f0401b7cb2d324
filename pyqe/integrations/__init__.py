"""Other people's programs. Each module needs the program that it is named after, or its answers alone."""
