"""``python -m acip_export`` is ``acip-export``."""

from acip_export.cli.main import main

main()
