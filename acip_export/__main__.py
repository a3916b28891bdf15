"""``python -m acip_export`` is ``acip-export``."""

from acip_export.cli import main

main()
