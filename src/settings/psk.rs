//! Reads keys, and says whether others can.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use zeroize::Zeroizing;

use crate::channel::session::Psk;
use crate::settings::config::ConfigError;

/// Longest key file that is read: 44 characters of base64, white space, and room for a mistake to
/// be explained.
const MAX_KEY_FILE: u64 = 4_096;

pub(super) fn read_psk(path: &Path, warnings: &mut Vec<String>) -> Result<Psk, ConfigError> {
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

/// Reads a file that may hold a key; tells whether other users can, too.
pub(super) fn open_to_read(path: &Path, most: u64, text: &mut String) -> std::io::Result<bool> {
    /// Read or write for the group or for everybody.
    const OTHERS: u32 = 0o066;
    let file = fs::File::open(path)?;
    let open = file.metadata()?.permissions().mode() & OTHERS != 0;
    file.take(most).read_to_string(text)?;
    Ok(open)
}

pub(super) fn exposed(path: &Path) -> String {
    format!(
        "{0} holds a key and is open to other users of this host; close it: chmod 600 {0}",
        path.display()
    )
}
