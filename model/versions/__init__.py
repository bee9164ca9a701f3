"""Model versions: the store on disk, publishing, canary releases and their guard."""
