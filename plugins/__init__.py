"""The swappable parts: one folder per kind, one file per part. Only `conf/` names them."""
