"""More endpoints, one module each, which are extensions of the server (see EXTENSIONS in settings.py)."""
