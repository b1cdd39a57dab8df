//! Whom the rules of `--outgoing` mean on this host: the numbers of users and control groups, as
//! the kernel's programs compare them.
//!
//! A user is looked up once, in `/etc/passwd`: one that is only known elsewhere (LDAP) is named by
//! number. A control group goes when its service stops and comes back as another one, so it is
//! looked for every second.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::service::{Result, input};
use crate::kernel::bpf::BpfError;
use crate::kernel::programs::Chosen;
use crate::kernel::steer::Steering;
use crate::model::outgoing::{ByPort, Outgoing, User};
use crate::settings::config::Config;
use crate::settings::files::Files;

/// Where users stand.
const PASSWD: &str = "/etc/passwd";

/// Where control groups are, alone and beside those of version 1.
const MOUNTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// A file that only version 2 has at its root (`Documentation/admin-guide/cgroup-v2.rst`).
const OF_VERSION_2: &str = "cgroup.controllers";

/// The control groups that rules name.
#[derive(Debug, Default)]
pub(super) struct Cgroups(Vec<Cgroup>);

#[derive(Debug)]
struct Cgroup {
    /// The number of its rule.
    rule: u32,
    path: PathBuf,
    /// Its own number, as the programs know it.
    told: Option<u64>,
}

impl Cgroups {
    /// Tells the programs which control groups there are now.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn look(&mut self, steering: &Steering) -> std::result::Result<(), BpfError> {
        for cgroup in &mut self.0 {
            // The number of a control group is that of its inode (Linux 5.5).
            let id = fs::metadata(&cgroup.path).map_or(0, |it| it.ino());
            if cgroup.told != Some(id) {
                steering.set_cgroup(cgroup.rule, id)?;
                cgroup.told = Some(id);
            }
        }
        Ok(())
    }
}

/// What the programs are to take because of its port.
///
/// # Errors
/// If a user is not known, or this host has no control groups of version 2.
pub(super) fn chosen(config: &Config, files: &Files) -> Result<(Vec<Chosen>, Cgroups)> {
    let mut cgroups = Cgroups::default();
    let mut chosen = Vec::new();
    let rules = config.peers.iter().flat_map(|peer| &peer.outgoing);
    for (rule, by_port) in (0..).zip(rules.filter_map(Outgoing::by_port)) {
        let ByPort {
            ports,
            user,
            cgroup,
            from: _,
        } = by_port;
        let number = |user| number(user, files);
        let user = user.as_ref().map(number).transpose()?;
        let cgroup_depth = match cgroup {
            None => None,
            Some(path) => {
                let path = path.trim_start_matches('/');
                cgroups.0.push(Cgroup {
                    rule,
                    path: mount()?.join(path),
                    told: None,
                });
                Some(path.split('/').count() as u32)
            }
        };
        chosen.push(Chosen {
            ports: ports.clone(),
            user,
            cgroup_depth,
        });
    }
    Ok((chosen, cgroups))
}

/// The number of a user.
fn number(user: &User, files: &Files) -> Result<u32> {
    let name = match user {
        User::Id(id) => return Ok(*id),
        User::Name(name) => name,
    };
    let users = files.read(Path::new(PASSWD));
    let users = users.map_or_else(|_| Default::default(), |(text, _)| text);
    number_in(&users, name).ok_or_else(|| {
        input(format!(
            "--outgoing: no user in {PASSWD} is called {name}; write the number, as `id -u {name}` \
             prints it"
        ))
    })
}

/// The number of the user with this name (`passwd(5)`).
fn number_in(users: &str, name: &str) -> Option<u32> {
    users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let is_it = fields.next() == Some(name);
        fields.nth(1).filter(|_| is_it)?.parse().ok()
    })
}

/// Where control groups of version 2 are.
fn mount() -> Result<&'static Path> {
    let found = MOUNTS.into_iter().map(Path::new);
    let mut found = found.filter(|mount| mount.join(OF_VERSION_2).exists());
    found.next().ok_or_else(|| {
        input(
            "--outgoing: this system has no control groups of version 2 at /sys/fs/cgroup, so \
             cgroup= names none; use user= instead",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_known_by_name() {
        let users = "root:x:0:0:root:/root:/bin/sh\nmail:x:8:8:mail:/var/mail:/usr/sbin/nologin\n\
                     mailman:x:38:38::/:/bin/false\nbroken\n";
        for (name, number) in [
            ("root", Some(0)),
            ("mail", Some(8)),
            ("mailman", Some(38)),
            ("broken", None),
            ("x", None),
        ] {
            assert_eq!(number_in(users, name), number, "{name}");
        }
        let files = Files::on_disk();
        assert_eq!(number(&User::Id(7), &files).unwrap(), 7);
        let error = number(&User::Name("no-such-user".into()), &files).unwrap_err();
        assert!(error.to_string().contains("id -u no-such-user"), "{error}");
    }
}
