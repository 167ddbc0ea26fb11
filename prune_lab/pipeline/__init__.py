"""One run: matched, validated, its phases reused, resumed or done, its results written."""
