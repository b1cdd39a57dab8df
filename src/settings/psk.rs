//! Reads keys, and tells whether other users can read them too.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use zeroize::Zeroizing;

use crate::channel::session::Psk;
use crate::settings::config::ConfigError;

/// The environment variable that may hold the key.
pub(crate) const PSK_VARIABLE: &str = "IPMOVED_PSK";

/// Longest key file that is read: 44 characters of base64, white space, and enough of a wrong file
/// to say what is wrong.
const MAX_KEY_FILE: u64 = 4_096;

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
pub(super) fn read(path: &Path, warnings: &mut Vec<String>) -> Result<Psk, ConfigError> {
    let wrong = |error: std::io::Error| ConfigError::File {
        hint: if error.kind() == std::io::ErrorKind::NotFound {
            "; make one with `ipmoved genpsk`"
        } else {
            " (--psk-file)"
        },
        path: path.into(),
        error,
    };
    let mut text = Zeroizing::new(String::new());
    if open_to_read(path, MAX_KEY_FILE, &mut text).map_err(wrong)? {
        warnings.push(exposed(path));
    }
    text.parse::<Psk>().map_err(|error| ConfigError::Psk {
        origin: path.display().to_string(),
        error,
    })
}

/// Reads a file that may hold a key; true if other users can read it too.
pub(super) fn open_to_read(path: &Path, most: u64, text: &mut String) -> std::io::Result<bool> {
    /// Read or write for the group or for everybody.
    const OTHERS: u32 = 0o066;
    let file = fs::File::open(path)?;
    let open = file.metadata()?.permissions().mode() & OTHERS != 0;
    file.take(most).read_to_string(text)?;
    Ok(open)
}

/// The warning about a file with a key that other users can read.
pub(super) fn exposed(path: &Path) -> String {
    format!(
        "{0} holds a key and is open to other users of this host; close it: chmod 600 {0}",
        path.display()
    )
}
