"""What arrives and leaves over HTTP: a request's body, its decoding, and errors as problem+json."""
