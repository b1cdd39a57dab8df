//! What a person is told who lacks a privilege: it depends on whom ipmoved runs as.

/// What to do to have these capabilities. `flags` are those of `docker run` that give them.
pub fn remedy(capabilities: &str, flags: &str) -> String {
    words(capabilities, flags, rustix::process::geteuid().is_root())
}

fn words(capabilities: &str, flags: &str, is_root: bool) -> String {
    if is_root {
        format!(
            "root has not {capabilities} here, as in a container that was not given it: `docker \
             run {flags}`, or run ipmoved on the host (a container with a user namespace of its \
             own, as rootless ones have, cannot be given everything)"
        )
    } else {
        format!("run as root, or with {capabilities}; in a container, `docker run {flags}`")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_root_already_is_not_told_to_become_root() {
        let said = |is_root| words("CAP_NET_ADMIN", "--cap-add NET_ADMIN", is_root);
        assert!(!said(true).contains("run as root"), "{}", said(true));
        assert!(said(false).starts_with("run as root, or with CAP_NET_ADMIN; in a container"));
        for said in [said(true), said(false)] {
            assert!(said.contains("`docker run --cap-add NET_ADMIN`"), "{said}");
        }
    }
}
