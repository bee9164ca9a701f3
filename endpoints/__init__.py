"""Further endpoints, one Flask blueprint each. Extensions of the server (see EXTENSIONS in settings.py)."""
