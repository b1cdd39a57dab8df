//! What is said of a peer: whether it is there, has the same key, and knows the time.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use super::probe::Answer;
use super::words::quoted;
use crate::channel::session::{Accepts, Offer};
use crate::model::finding::Finding;
use crate::model::moved::Move;
use crate::model::peer::Role;
use crate::model::status::{State, TunnelStatus};

/// Clocks that are so far apart are worth a word: what both servers log and record is compared.
const APART: Duration = Duration::from_secs(5);

/// What every path of IPv6 carries (RFC 8200, section 5).
const LEAST_PATH: u32 = 1_280;

/// This server's version.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What is known of this end.
pub(super) struct Own<'a> {
    pub(super) role: Role,
    pub(super) offer: Offer,
    /// The file of the key, if it is in one.
    pub(super) psk_file: Option<&'a Path>,
    /// This server's clock, when the answer came, in nanoseconds since 1970.
    pub(super) clock: u64,
    /// The same command without `--cipher`, if that was typed.
    pub(super) without_cipher: Option<String>,
    /// The port that the peer would reach this server at was listened on.
    pub(super) listened: bool,
}

/// What came of asking a peer.
pub(super) fn judge(peer: SocketAddr, answer: &Answer, own: &Own<'_>) -> Vec<Finding> {
    const NAME: &str = "peer";
    let other = other(own.role);
    match answer {
        Answer::Agrees {
            payload,
            rtt,
            refuses,
        } => {
            let ms = rtt.as_secs_f64() * 1_000.0;
            let text = format!("answers after {ms:.1} ms, and has the same key");
            let mut found = vec![Finding::ok(NAME, peer, text)];
            if payload.cipher.is_none() {
                let text = format!(
                    "allows other ciphers ({}) than this server ({}): give both the same --cipher, \
                     or none",
                    payload.offer.ciphers, own.offer.ciphers
                );
                let shows = "grep -rn cipher /etc/ipmoved/";
                let both = || format!("{shows}; ssh {} {shows}", peer.ip());
                let remedy = own.without_cipher.clone().unwrap_or_else(both);
                found.push(Finding::fail("cipher", peer, text, remedy));
            }
            found.extend(accepts(peer, payload.accepts, refuses));
            found.extend(clock(peer, payload.clock, own.clock));
            found.push(version(peer, payload.version));
            found
        }
        Answer::Calls(payload) => {
            let text = format!(
                "calls this server, with the same key, but does not answer: what this server sends \
                 does not come there; is UDP port {} open on the {other}",
                peer.port()
            );
            let remedy = format!("ssh {} nft list ruleset", peer.ip());
            let mut found = vec![Finding::fail(NAME, peer, text, remedy)];
            found.extend(clock(peer, payload.timestamp, own.clock));
            found
        }
        Answer::SameRole => {
            let text = match own.role {
                Role::Old => "was given --move as well: give it to the old server only",
                Role::New => "was not given --move either: give it to the old server",
            };
            let remedy = format!("ssh {} grep -rn move /etc/ipmoved/", peer.ip());
            vec![Finding::fail(NAME, peer, text, remedy)]
        }
        Answer::OtherKey => {
            let text = format!("has another key than this server; compare it with the {other}'s");
            vec![Finding::fail("key", peer, text, compare(own, peer))]
        }
        Answer::OtherVersion => {
            let text = "speaks another version of the protocol: update the older one";
            let remedy = format!("ssh {} ipmoved --version", peer.ip());
            vec![Finding::fail("version", peer, text, remedy)]
        }
        Answer::Refused(error) => vec![refused(peer, error, other)],
        Answer::Nothing => {
            let text = format!(
                "does not answer: the address or the key is another, or a firewall drops UDP port \
                 {} on the way{}",
                peer.port(),
                match own.listened {
                    true => "",
                    false => "; the daemon that runs here may know more",
                }
            );
            vec![Finding::fail(NAME, peer, text, compare(own, peer))]
        }
    }
}

fn other(own: Role) -> &'static str {
    match own {
        Role::Old => "new server",
        Role::New => "old server",
    }
}

/// The command that shows whether both have the same key, without showing it.
fn compare(own: &Own<'_>, peer: SocketAddr) -> String {
    let file = own.psk_file.unwrap_or(Path::new("/etc/ipmoved/psk"));
    let file = quoted(&file.display().to_string());
    format!(
        "sha256sum {file}; ssh {} sha256sum /etc/ipmoved/psk",
        peer.ip()
    )
}

fn refused(peer: SocketAddr, error: &std::io::Error, other: &str) -> Finding {
    const NAME: &str = "peer";
    let port = peer.port();
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "others are told in the kernel's words"
    )]
    match error.kind() {
        ErrorKind::ConnectionRefused => {
            let text = format!(
                "is there, and nothing listens on its UDP port {port}: start ipmoved on the {other}"
            );
            let remedy = format!("ssh {} systemctl start ipmoved", peer.ip());
            Finding::warn(NAME, peer, text, remedy)
        }
        ErrorKind::PermissionDenied => {
            let text = "this server's own firewall drops what is sent to it (output)";
            Finding::fail(NAME, peer, text, "nft list ruleset")
        }
        ErrorKind::HostUnreachable => {
            let text = "no such host there, or a firewall on the way rejects the tunnel";
            Finding::fail(NAME, peer, text, format!("ping -c 3 {}", peer.ip()))
        }
        _ => {
            let text = format!("cannot be reached: {error}");
            Finding::fail(NAME, peer, text, format!("ip route get {}", peer.ip()))
        }
    }
}

/// What the new server says of moves.
fn accepts(peer: SocketAddr, last: Accepts, refuses: &[Move]) -> Option<Finding> {
    const NAME: &str = "accept";
    match (refuses, last) {
        ([], Accepts::Unsaid) => None,
        ([], Accepts::Yes | Accepts::No) => {
            Some(Finding::ok(NAME, peer, "the new server accepts what moves"))
        }
        (some, _) => {
            let flags: Vec<String> = some.iter().map(|it| format!("--accept {it}")).collect();
            let text = format!(
                "the new server's settings do not accept what moves: give it {}",
                flags.join(" ")
            );
            let remedy = format!("ssh {} grep -rn accept /etc/ipmoved/", peer.ip());
            Some(Finding::fail(NAME, peer, text, remedy))
        }
    }
}

/// What the path to a peer carries, as far as routers on it say.
pub(super) fn path(peer: SocketAddr, carries: u32, uplink: u32) -> Finding {
    const NAME: &str = "mtu";
    let text = format!("the path carries packets of {carries} bytes, by all that is known");
    if carries < LEAST_PATH {
        let text = format!("{text}: each full packet of a client is split over several");
        // Whoever on the way carries no more says so, and how much.
        let headers = if peer.is_ipv4() { 28 } else { 48 };
        let payload = LEAST_PATH - headers;
        let remedy = format!("ping -c 3 -M do -s {payload} {}", peer.ip());
        return Finding::warn(NAME, peer, text, remedy);
    }
    let more = if carries < uplink {
        format!(", fewer than the uplink's {uplink}")
    } else {
        String::new()
    };
    Finding::ok(NAME, peer, format!("{text}{more}"))
}

/// How far the clocks are apart, if the peer says what its one shows.
fn clock(peer: SocketAddr, theirs: u64, ours: u64) -> Option<Finding> {
    if theirs == 0 {
        return None;
    }
    let apart = Duration::from_nanos(theirs.abs_diff(ours));
    let seconds = apart.as_secs();
    Some(if apart < APART {
        Finding::ok("clock", peer, "shows the same time as this server's")
    } else if theirs > ours {
        let text = format!("shows a time {seconds} s after this server's: one of them is wrong");
        Finding::warn("clock", peer, text, "timedatectl set-ntp true")
    } else {
        let text = format!("shows a time {seconds} s before this server's: one of them is wrong");
        let remedy = format!("ssh {} timedatectl set-ntp true", peer.ip());
        Finding::warn("clock", peer, text, remedy)
    })
}

fn version(peer: SocketAddr, theirs: [u8; 3]) -> Finding {
    const NAME: &str = "version";
    let [major, minor, patch] = theirs;
    let theirs = format!("{major}.{minor}.{patch}");
    if theirs == VERSION {
        return Finding::ok(NAME, peer, format!("is {theirs}, as here"));
    }
    let text = match theirs.as_str() {
        "0.0.0" => format!("is older than {VERSION}, and does not say which"),
        _ => format!("is {theirs}, and {VERSION} here: they understand each other"),
    };
    Finding::ok(NAME, peer, text)
}

/// What the daemon that runs here knows of a peer.
pub(super) fn known(tunnel: &TunnelStatus) -> Vec<Finding> {
    const NAME: &str = "tunnel";
    let TunnelStatus {
        peer, state, mtu, ..
    } = tunnel;
    let mut found = Vec::new();
    match state {
        State::Up => {
            let rtt = tunnel
                .rtt_ms
                .map_or_else(String::new, |ms| format!(" after {ms:.1} ms"));
            let text = format!("is up, and answers{rtt}; the path carries {mtu} bytes in one");
            found.push(Finding::ok(NAME, peer, text));
        }
        State::Connecting | State::Down => {
            let text = "the daemon that runs here does not reach it";
            found.push(Finding::fail(NAME, peer, text, "ipmoved status"));
        }
    }
    for refused in &tunnel.refused {
        let text = format!("{}: {}", refused.moved, refused.why);
        found.push(Finding::fail("accept", peer, text, "ipmoved status"));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::session::{CipherPolicy, ResponsePayload};
    use crate::model::finding::Grade;

    fn offer() -> Offer {
        Offer {
            ciphers: CipherPolicy::Auto.into(),
            aes_hardware: true,
        }
    }

    fn judged(answer: &Answer) -> Vec<Finding> {
        let own = Own {
            role: Role::Old,
            offer: offer(),
            psk_file: None,
            clock: 1_000_000_000_000,
            without_cipher: None,
            listened: true,
        };
        judge("198.51.100.2:51850".parse().unwrap(), answer, &own)
    }

    fn agrees(clock: u64) -> Answer {
        let payload = ResponsePayload {
            run: 1,
            cipher: None,
            offer: offer(),
            lanes: 1,
            clock,
            version: [9, 8, 7],
            accepts: Accepts::Unsaid,
        };
        Answer::Agrees {
            payload,
            rtt: Duration::from_millis(3),
            refuses: Vec::new(),
        }
    }

    #[test]
    fn what_an_answer_says_of_clocks_and_ciphers_is_told() {
        let names = |found: &[Finding]| -> Vec<(&str, Grade)> {
            found.iter().map(|it| (it.name, it.result)).collect()
        };
        let found = judged(&agrees(1_001_000_000_000));
        let (ok, warn, fail) = (Grade::Ok, Grade::Warn, Grade::Fail);
        assert_eq!(
            names(&found),
            [
                ("peer", ok),
                ("cipher", fail),
                ("clock", ok),
                ("version", ok)
            ]
        );
        let ahead = judged(&agrees(1_100_000_000_000));
        assert_eq!(ahead[2].result, warn);
        assert!(ahead[2].text.contains("100 s after"), "{}", ahead[2].text);
        let behind = judged(&agrees(900_000_000_000));
        assert!(behind[2].remedy.as_deref().unwrap().starts_with("ssh "));
        // An older one does not say.
        assert_eq!(names(&judged(&agrees(0)))[2], ("version", ok));
    }

    #[test]
    fn what_the_new_server_does_not_accept_is_named() {
        let peer = "198.51.100.2:51850".parse().unwrap();
        assert_eq!(accepts(peer, Accepts::Unsaid, &[]), None);
        let yes = accepts(peer, Accepts::Yes, &[]).unwrap();
        assert_eq!(yes.result, Grade::Ok);
        let moved = "192.0.2.5:80/tcp".parse().unwrap();
        let no = accepts(peer, Accepts::Yes, &[moved]).unwrap();
        assert_eq!(no.result, Grade::Fail);
        assert!(
            no.text.ends_with("--accept 192.0.2.5:80/tcp"),
            "{}",
            no.text
        );
        for (carries, result) in [(1_500, Grade::Ok), (1_400, Grade::Ok), (1_200, Grade::Warn)] {
            assert_eq!(path(peer, carries, 1_500).result, result);
        }
    }

    #[test]
    fn why_there_is_no_answer_is_told_as_far_as_it_shows() {
        let error = |kind: ErrorKind| Answer::Refused(kind.into());
        for (answer, grade, says) in [
            (Answer::Nothing, Grade::Fail, "the address or the key"),
            (Answer::OtherKey, Grade::Fail, "another key"),
            (Answer::SameRole, Grade::Fail, "--move as well"),
            (Answer::OtherVersion, Grade::Fail, "another version"),
            (
                error(ErrorKind::ConnectionRefused),
                Grade::Warn,
                "nothing listens",
            ),
            (
                error(ErrorKind::HostUnreachable),
                Grade::Fail,
                "no such host",
            ),
            (
                error(ErrorKind::PermissionDenied),
                Grade::Fail,
                "own firewall",
            ),
            (
                error(ErrorKind::NetworkUnreachable),
                Grade::Fail,
                "cannot be reached",
            ),
        ] {
            let found = &judged(&answer)[0];
            assert_eq!(found.result, grade, "{found:?}");
            assert!(found.text.contains(says), "{found:?}");
            assert!(found.remedy.is_some(), "{found:?}");
        }
    }
}
