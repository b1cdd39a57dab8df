//! Where the daemon keeps what it needs while it runs.

/// Where the directories of all network namespaces lie. It is emptied at boot, as the kernel's state is.
pub const BASE_DIR: &str = "/run/ipmoved";

/// Name of the status socket in the directory of the namespace.
pub const STATUS_SOCKET: &str = "status.sock";
