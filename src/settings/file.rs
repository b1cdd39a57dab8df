//! The configuration file, as TOML has it, before anything is made of it.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use zeroize::Zeroizing;

use crate::channel::session::CipherPolicy;
use crate::settings::args::{LogFormat, Offload};
use crate::settings::config::ConfigError;
use crate::settings::psk::{exposed, open_to_read};

/// The configuration file: the flags' names without the dashes, and `[[peers]]` for several.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct FileConfig {
    pub(super) peer: Option<String>,
    pub(super) psk: Option<Secret>,
    pub(super) psk_file: Option<PathBuf>,
    #[serde(rename = "move")]
    pub(super) moves: OneOrMany,
    pub(super) deliver_to: Option<OneOrMany>,
    pub(super) deliver: OneOrMany,
    pub(super) listen: Option<Listen>,
    pub(super) tun: Option<String>,
    pub(super) uplink: Option<String>,
    pub(super) max_flows: Option<u32>,
    pub(super) lanes: Option<u8>,
    pub(super) cipher: Option<CipherPolicy>,
    pub(super) rekey_after: Option<u64>,
    pub(super) log_format: Option<LogFormat>,
    pub(super) no_split: bool,
    pub(super) without: Vec<Offload>,
    pub(super) peers: Vec<FilePeer>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(super) struct FilePeer {
    pub(super) peer: Option<String>,
    pub(super) psk: Option<Secret>,
    pub(super) psk_file: Option<PathBuf>,
    #[serde(rename = "move")]
    pub(super) moves: OneOrMany,
    pub(super) deliver_to: Option<OneOrMany>,
    pub(super) deliver: OneOrMany,
}

/// A text that is overwritten when it is done with.
#[derive(Deserialize)]
#[serde(from = "String")]
pub(super) struct Secret(pub(super) Zeroizing<String>);

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(Zeroizing::new(text))
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// `"192.0.2.5"` as well as `["192.0.2.5", "192.0.2.6"]`.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl Default for OneOrMany {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl OneOrMany {
    pub(super) fn as_slice(&self) -> &[String] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }

    pub(super) fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// `51850` as well as `"192.0.2.1:51850"`.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Listen {
    Port(u16),
    Text(String),
}

impl Listen {
    pub(super) fn into_text(self) -> String {
        match self {
            Self::Port(port) => port.to_string(),
            Self::Text(text) => text,
        }
    }
}

impl FileConfig {
    pub(super) fn read(path: &Path, warnings: &mut Vec<String>) -> Result<Self, ConfigError> {
        let mut text = Zeroizing::new(String::new());
        let open = open_to_read(path, u64::MAX, &mut text).map_err(|error| ConfigError::File {
            path: path.into(),
            error,
            hint: " (--config)",
        })?;
        let file = Self::parse(&text).map_err(|message| ConfigError::Toml {
            path: path.into(),
            message,
        })?;
        if open && (file.psk.is_some() || file.peers.iter().any(|peer| peer.psk.is_some())) {
            warnings.push(exposed(path));
        }
        Ok(file)
    }

    pub(super) fn parse(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|error| {
            let line = error
                .span()
                .map(|span| text[..span.start].matches('\n').count() + 1);
            let message = error.message().replace('\n', " ");
            match line {
                Some(line) => format!("line {line}: {message}"),
                None => message,
            }
        })
    }
}
