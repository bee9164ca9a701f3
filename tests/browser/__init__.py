"""Tests of the pages in a real browser: .ci/browser runs them, `make test` does not."""
