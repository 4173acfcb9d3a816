"""Backups: what a coordinator knows, in a folder, whole or not there; and how another coordinator is made of one.

    backup.json   the inventory, signed with the owner's key and written last: without it there is no backup
    files/        the journal, as one file of SQLite whatever it is in, and the blobs that it names, each by its digest

No key is in it, no password, and no half upload: sites send those again. What an earlier backup in the folder has is
not copied again, and that one holds until the new one is whole.
"""
