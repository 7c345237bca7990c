"""`fastformer demo`: one fine-tuning task run stock and patched, side by side, and an honest table of the two."""
