"""Conversations as rows to train on: formats, templates, trained spans, order and batches."""
