//! The login that a command is given from.

use std::net::{IpAddr, SocketAddr};

/// Most processes above this one that are asked for the login.
const MAX_ANCESTORS: usize = 64;

/// `SSH_CONNECTION` of this process, or of the nearest one above it that has it: sudo(8) takes it
/// away.
fn ssh_connection() -> Option<String> {
    const NAME: &[u8] = b"SSH_CONNECTION=";
    if let Ok(own) = std::env::var("SSH_CONNECTION") {
        return Some(own);
    }
    let mut pid = std::os::unix::process::parent_id();
    for _ in 0..MAX_ANCESTORS {
        let environ = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
        let mut words = environ.split(|&byte| byte == 0);
        if let Some(found) = words.find_map(|word| word.strip_prefix(NAME)) {
            return String::from_utf8(found.into()).ok();
        }
        // The name of a program may have spaces and brackets (proc(5)).
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (_, behind) = stat.rsplit_once(')')?;
        pid = behind.split_whitespace().nth(1)?.parse().ok()?;
    }
    None
}

/// Both ends of the login that this process is started from, the client's first, if there is one
/// (sshd(8)).
pub fn ends() -> Option<(SocketAddr, SocketAddr)> {
    let text = ssh_connection()?;
    let words: Vec<&str> = text.split(' ').collect();
    let [client, client_port, server, server_port] = words[..] else {
        return None;
    };
    let end = |addr: &str, port: &str| {
        let addr: IpAddr = addr.parse().ok()?;
        Some(SocketAddr::new(addr.to_canonical(), port.parse().ok()?))
    };
    Some((end(client, client_port)?, end(server, server_port)?))
}
