//! The name that a client's first bytes ask for: that of TLS (SNI), or of HTTP (Host).
//!
//! It tells a stale name from an address that is written down somewhere. Knows nothing of clients.
//! QUIC's first packets are encrypted, with keys that everybody can derive. They are not read: the
//! libraries that open them are a server's, and take the whole connection.

use std::net::IpAddr;

use rustls::server::Acceptor;

/// Stands for no name where there is a place for one.
pub const NO_NAME: &str = "(none)";

/// Longest name DNS has (RFC 1035, section 2.3.4).
const MAX_NAME: usize = 253;

/// Header lines of HTTP that are looked at.
const MAX_HEADERS: usize = 64;

/// The name that is asked for, or [`NO_NAME`]; `None` if this is no protocol that has one.
pub(super) fn asked(first_bytes: &[u8]) -> Option<String> {
    match first_bytes.first()? {
        22 => tls(first_bytes),
        b'A'..=b'Z' => http(first_bytes),
        _ => None,
    }
}

fn tls(mut bytes: &[u8]) -> Option<String> {
    let mut acceptor = Acceptor::default();
    while !bytes.is_empty() {
        if acceptor.read_tls(&mut bytes).ok()? == 0 {
            break;
        }
        if let Some(accepted) = acceptor.accept().ok()? {
            let hello = accepted.client_hello();
            return Some(hello.server_name().map_or(NO_NAME.into(), plain));
        }
    }
    None
}

fn http(bytes: &[u8]) -> Option<String> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    if !request.parse(bytes).ok()?.is_complete() {
        return None;
    }
    let mut headers = request.headers.iter();
    let host = headers.find(|header| header.name.eq_ignore_ascii_case("host"));
    Some(host.map_or(NO_NAME.into(), |host| {
        plain(&String::from_utf8_lossy(host.value))
    }))
}

/// A name as it is kept: without its port, in small letters, and without what no name has, since a
/// client can send whatever it likes. An address is no name.
fn plain(host: &str) -> String {
    let host = host.trim();
    let host = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let of_names = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    if name.is_empty()
        || name.len() > MAX_NAME
        || !name.bytes().all(of_names)
        || host.parse::<IpAddr>().is_ok()
        || bare.parse::<IpAddr>().is_ok()
    {
        return NO_NAME.into();
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A ClientHello of TLS 1.2, with this name.
    pub(crate) fn hello(name: Option<&str>) -> Vec<u8> {
        let mut extensions = vec![0, 13, 0, 4, 0, 2, 4, 3];
        if let Some(name) = name {
            let len = name.len() as u16;
            for word in [0, len + 5, len + 3] {
                extensions.extend_from_slice(&word.to_be_bytes());
            }
            extensions.push(0);
            extensions.extend_from_slice(&len.to_be_bytes());
            extensions.extend_from_slice(name.as_bytes());
        }
        let mut body = vec![3, 3];
        body.extend_from_slice(&[7; 32]);
        body.extend_from_slice(&[0, 0, 2, 0xc0, 0x2f, 1, 0]);
        body.extend_from_slice(&(extensions.len() as u16).to_be_bytes());
        body.extend_from_slice(&extensions);
        let mut hello = vec![1, 0];
        hello.extend_from_slice(&(body.len() as u16).to_be_bytes());
        hello.extend_from_slice(&body);
        let mut record = vec![22, 3, 1];
        record.extend_from_slice(&(hello.len() as u16).to_be_bytes());
        record.extend_from_slice(&hello);
        record
    }

    fn http(host: &str) -> Option<String> {
        asked(format!("GET / HTTP/1.1\r\nAccept: */*\r\nHost: {host}\r\n\r\n").as_bytes())
    }

    #[test]
    fn tls_and_http_tell_a_name() {
        assert_eq!(
            asked(&hello(Some("www.example.net"))).as_deref(),
            Some("www.example.net")
        );
        assert_eq!(asked(&hello(None)).as_deref(), Some(NO_NAME));
        for (host, name) in [
            ("www.example.net", "www.example.net"),
            ("WWW.example.net:8080", "www.example.net"),
            ("www.example.net.", "www.example.net"),
            ("192.0.2.5", NO_NAME),
            ("192.0.2.5:80", NO_NAME),
            ("[2001:db8::5]:80", NO_NAME),
            ("", NO_NAME),
            ("=cmd|x", NO_NAME),
            ("a b", NO_NAME),
            ("\u{1b}[2J", NO_NAME),
        ] {
            let said = http(host).unwrap_or(NO_NAME.into());
            assert_eq!(said, name, "{host}");
        }
        assert_eq!(asked(b"GET / HTTP/1.0\r\n\r\n").as_deref(), Some(NO_NAME));
        let hello = hello(Some("www.example.net"));
        for other in [
            &b""[..],
            b"SSH-2.0-x\r\n",
            b"EHLO a\r\n",
            b"GET / HT",
            &hello[..30],
        ] {
            assert_eq!(asked(other), None);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_tell_what_is_no_name(
            bytes in proptest::collection::vec(any::<u8>(), 0..300), tls in any::<bool>(),
        ) {
            let mut bytes = bytes;
            if tls {
                bytes.splice(0..0, [22, 3, 1, 0, 200]);
            }
            let said = asked(&bytes).unwrap_or_default();
            let plain = |c: char| c.is_ascii_alphanumeric() || "._-()".contains(c);
            prop_assert!(said.len() <= MAX_NAME && said.chars().all(plain));
        }
    }
}
