"""One run: matched, rehearsed, its phases reused, resumed or done, its results written."""
