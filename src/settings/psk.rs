//! Reads keys, and tells whether other users can read them too.

use std::path::Path;

use zeroize::Zeroizing;

use crate::channel::session::Psk;
use crate::settings::config::{ConfigError, wants_root};
use crate::settings::files::Files;

/// The environment variable that may hold the key.
pub(crate) const PSK_VARIABLE: &str = "IPMOVED_PSK";

/// Takes the key out of the environment, if it is there.
pub(super) fn from_variable() -> Result<Option<Psk>, ConfigError> {
    let text = std::env::var(PSK_VARIABLE).map(Zeroizing::new);
    let Some(text) = text.ok().filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    text.parse().map(Some).map_err(|error| ConfigError::Psk {
        origin: PSK_VARIABLE.into(),
        error,
    })
}

/// Reads a key file. If others can read it too, `warnings` says so.
pub(super) fn read(
    path: &Path,
    files: &Files,
    warnings: &mut Vec<String>,
) -> Result<Psk, ConfigError> {
    let wrong = |error: std::io::Error| ConfigError::File {
        hint: if error.kind() == std::io::ErrorKind::NotFound {
            "; make one with `ipmoved genpsk`"
        } else if wants_root(&error) {
            " (--psk-file); try sudo"
        } else {
            " (--psk-file)"
        },
        path: path.into(),
        error,
    };
    let (text, open) = files.read(path).map_err(wrong)?;
    if open {
        warnings.push(exposed(path));
    }
    text.parse::<Psk>().map_err(|error| ConfigError::Psk {
        origin: path.display().to_string(),
        error,
    })
}

/// The warning about a file with a key that other users can read.
pub(super) fn exposed(path: &Path) -> String {
    format!(
        "{0} holds a key and is open to other users of this host; close it: chmod 600 {0}",
        path.display()
    )
}
