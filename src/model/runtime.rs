//! Where the daemon keeps what it needs while it runs.

/// Holds one directory for each network namespace. The system empties it at boot, when what a
/// daemon changed in the kernel is gone as well.
pub const BASE_DIR: &str = "/run/ipmoved";

/// Name of the status socket in the directory of the namespace.
pub const STATUS_SOCKET: &str = "status.sock";

/// Name of the file there that says where packets were delivered, and that of the next one.
pub const DELIVERED: &str = "delivered";
/// See [`DELIVERED`].
pub const DELIVERED_NEXT: &str = "delivered.next";

/// Name of the socket in the directory of the namespace over which flows are listed.
pub const FLOWS_SOCKET: &str = "flows.sock";

/// Name of the control socket in the directory of the namespace (old server).
pub const CONTROL_SOCKET: &str = "control.sock";

/// Name of the socket there at which a daemon hands itself over to the next one.
pub const HANDOVER_SOCKET: &str = "handover.sock";

/// Holds what lasts longer than a boot.
pub const STATE_DIR: &str = "/var/lib/ipmoved";
