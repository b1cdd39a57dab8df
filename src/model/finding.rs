//! What `ipmoved check` says of a server: one finding a line, with what to do about it.

use std::fmt::Write as _;

use serde::Serialize;

/// How a finding is meant. The worst decides how the command ends.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Grade {
    /// All is well.
    #[default]
    Ok,
    /// It may not work, or not as somebody expects.
    Warn,
    /// It cannot work.
    Fail,
}

impl Grade {
    /// The word in front of a line.
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }

    /// The exit code of `ipmoved check`.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Warn => 1,
            Self::Fail => 2,
        }
    }
}

/// Something that was looked at.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    /// The name of the check, which stays the same.
    pub name: &'static str,
    /// How it is meant.
    pub result: Grade,
    /// What it is about: an interface, an address, a port, a program.
    pub object: String,
    /// What was found.
    pub text: String,
    /// A command that mends it, or, where none can, shows it.
    pub remedy: Option<String>,
}

impl Finding {
    /// All is well.
    pub fn ok(name: &'static str, object: impl ToString, text: impl Into<String>) -> Self {
        Self {
            name,
            result: Grade::Ok,
            object: object.to_string(),
            text: text.into(),
            remedy: None,
        }
    }

    /// It may not work.
    pub fn warn(
        name: &'static str,
        object: impl ToString,
        text: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            result: Grade::Warn,
            remedy: Some(remedy.into()),
            ..Self::ok(name, object, text)
        }
    }

    /// It cannot work.
    pub fn fail(
        name: &'static str,
        object: impl ToString,
        text: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            result: Grade::Fail,
            ..Self::warn(name, object, text, remedy)
        }
    }

    /// What was found, and what to do, in one line.
    pub fn line(&self) -> String {
        let mut line = format!("{}: {}", self.object, self.text);
        if let Some(remedy) = &self.remedy {
            let _ = write!(line, "; run: {remedy}");
        }
        // A line break of somebody's text would look like another finding.
        line.replace(char::is_control, " ")
    }
}

/// Everything that was found, the worst first.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Findings {
    /// One for each thing that was looked at.
    pub checks: Vec<Finding>,
    /// The worst of them.
    pub result: Grade,
}

impl Findings {
    /// Puts them in order.
    pub fn of(mut checks: Vec<Finding>) -> Self {
        checks.sort_by_key(|it| std::cmp::Reverse(it.result));
        let result = checks.first().map(|it| it.result).unwrap_or_default();
        Self { checks, result }
    }

    /// A line for each.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        for it in &self.checks {
            let _ = writeln!(
                text,
                "{:<4}  {:<10}  {}",
                it.result.name(),
                it.name,
                it.line()
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_comes_first_and_decides() {
        let found = Findings::of(vec![
            Finding::ok("tun", "ipmoved0", "can be made"),
            Finding::warn("clock", "here", "is 9 s behind", "timedatectl"),
            Finding::fail("key", "192.0.2.1\n", "is another", "sha256sum psk"),
            Finding::ok("kernel", "6.1", "is new enough"),
        ]);
        assert_eq!(
            found.to_text(),
            "fail  key         192.0.2.1 : is another; run: sha256sum psk\n\
             warn  clock       here: is 9 s behind; run: timedatectl\n\
             ok    tun         ipmoved0: can be made\n\
             ok    kernel      6.1: is new enough\n"
        );
        assert_eq!((found.result, found.result.exit_code()), (Grade::Fail, 2));
        let json = serde_json::to_value(&found).unwrap();
        assert_eq!(json["result"], "fail");
        assert_eq!(json["checks"][1]["result"], "warn");
        assert_eq!(json["checks"][2]["remedy"], serde_json::Value::Null);
        assert_eq!(Findings::of(Vec::new()).result, Grade::Ok);
    }
}
