"""The command line. It imports no heavy package before a command needs one."""
