"""Where ``acip-export`` begins, and ``python -m acip_export``."""

from acip_export.interrupted import end_at_once


def main() -> None:
    """Run the command: an interruption is quiet while its modules are imported, too."""
    end_at_once(words=True)
    from acip_export.io.processes import let_threads_sleep

    let_threads_sleep()  # numpy looks when it is loaded, which the command line does
    from acip_export.cli.main import main as run

    run(own_process=True)


if __name__ == "__main__":
    main()
