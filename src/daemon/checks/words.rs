//! What was typed, and what to type instead.

/// The words of a command line.
#[derive(Clone, Debug)]
pub struct Words(Vec<String>);

impl Words {
    /// Those that this process was given. A key among them is not repeated.
    pub fn new(words: impl IntoIterator<Item = String>) -> Self {
        let mut all: Vec<String> = words.into_iter().collect();
        for at in 0..all.len() {
            if all[at].starts_with("--psk=") {
                "--psk=KEY".clone_into(&mut all[at]);
            } else if all[at] == "--psk" && at + 1 < all.len() {
                "KEY".clone_into(&mut all[at + 1]);
            }
        }
        Self(all)
    }

    /// Those of this process. What is not UTF-8 is not typed as it was.
    pub fn of_this_process() -> Self {
        Self::new(std::env::args_os().map(|word| word.to_string_lossy().into_owned()))
    }

    /// The same as before.
    pub(super) fn again(&self) -> String {
        let quoted = self.0.iter().map(|word| quoted(word));
        quoted.collect::<Vec<_>>().join(" ")
    }

    /// With other values of a flag, instead of those that were given.
    pub(super) fn with(&self, flag: &str, values: &[String]) -> String {
        let each = values.iter().map(|it| [format!("--{flag}"), it.clone()]);
        self.instead_of(flag, each.flatten())
    }

    /// With other words where a flag and its values stood, or at the end.
    pub(super) fn instead_of(&self, flag: &str, new: impl IntoIterator<Item = String>) -> String {
        let (long, joined) = (format!("--{flag}"), format!("--{flag}="));
        let mut words: Vec<String> = Vec::new();
        let mut place = None;
        let mut all = self.0.iter();
        while let Some(word) = all.next() {
            if *word == long {
                all.next();
            } else if !word.starts_with(&joined) {
                words.push(word.clone());
                continue;
            }
            place.get_or_insert(words.len());
        }
        let place = place.unwrap_or(words.len());
        words.splice(place..place, new);
        Self(words).again()
    }

    /// With one address in the place of another, within longer words too, as in `192.0.2.5:80`.
    pub(super) fn replacing(&self, old: &str, new: &str) -> String {
        let words = self.0.iter().map(|word| replaced(word, old, new));
        Self(words.collect()).again()
    }

    /// Whether they name no settings at all: no flag but `--json`.
    pub(super) fn are_bare(&self) -> bool {
        let mut flags = self.0.iter().filter(|word| word.starts_with('-'));
        flags.all(|word| word == "--json")
    }

    /// Whether one of them holds this.
    pub(super) fn hold(&self, text: &str) -> bool {
        self.0.iter().any(|word| word.contains(text))
    }
}

/// A word with one address in the place of another, but where it is a part of a longer one.
fn replaced(word: &str, old: &str, new: &str) -> String {
    let is_of_address =
        |c: char| c.is_ascii_hexdigit() || c == '.' || old.contains(':') && c == ':';
    let (mut out, mut rest) = (String::new(), word);
    while let Some(at) = rest.find(old).filter(|_| !old.is_empty()) {
        let (before, after) = (&rest[..at], &rest[at + old.len()..]);
        let goes_on = out.chars().last().filter(|_| before.is_empty());
        let is_part = before.chars().last().or(goes_on).is_some_and(is_of_address)
            || after.chars().next().is_some_and(is_of_address);
        out.push_str(before);
        out.push_str(if is_part { old } else { new });
        rest = after;
    }
    out + rest
}

/// As a shell takes it for one word.
pub(in crate::daemon) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_./:=,@%+-".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Words {
        Words::new(text.split(' ').map(str::to_owned))
    }

    #[test]
    fn a_flag_gets_other_values_where_it_stood() {
        let given = words("ipmoved check --move 192.0.2.5 --peer a --move=192.0.2.6 --json");
        assert_eq!(
            given.with("move", &["[2001:db8::5]:80".into(), "192.0.2.7".into()]),
            "ipmoved check --move '[2001:db8::5]:80' --move 192.0.2.7 --peer a --json"
        );
        assert_eq!(
            words("ipmoved --peer a").with("listen", &["51851".into()]),
            "ipmoved --peer a --listen 51851"
        );
        assert!(words("ipmoved check --json").are_bare() && !given.are_bare());
        let other = given.replacing("192.0.2.5", "10.0.0.5");
        assert!(other.contains("--move 10.0.0.5 --peer"), "{other}");
        for (word, becomes) in [
            ("192.0.2.5", "10.0.0.5"),
            ("192.0.2.5:80/tcp", "10.0.0.5:80/tcp"),
            ("--move=192.0.2.5/32", "--move=10.0.0.5/32"),
            ("192.0.2.50", "192.0.2.50"),
            ("1.192.0.2.5", "1.192.0.2.5"),
        ] {
            assert_eq!(replaced(word, "192.0.2.5", "10.0.0.5"), becomes);
        }
    }

    #[test]
    fn a_key_is_not_repeated_and_a_shell_reads_each_word_as_one() {
        let given = words("ipmoved --psk secret --psk=secret");
        assert_eq!(given.again(), "ipmoved --psk KEY --psk=KEY");
        let file = ["--psk-file", "FILE"].map(str::to_owned);
        assert_eq!(given.instead_of("psk", file), "ipmoved --psk-file FILE");
        assert_eq!(quoted("it's [a]"), r"'it'\''s [a]'");
        assert_eq!(quoted(""), "''");
    }
}
