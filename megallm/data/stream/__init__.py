"""The stream: packed documents, each exactly once."""
