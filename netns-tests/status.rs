//! What `status` says, and that daemons of one machine do not mix.
//!
//! ```text
//!  lab 1: clients ── router ──┬── old server ipmoved0     lab 2: the same addresses,
//!                             └── new server ipmoved0            the same names
//! ```

use ipmoved::internals::Role;
use ipmoved::lab::topology::{MOVED, NEW, OLD};
use ipmoved::lab::{Lab, Service};

use crate::stage::{MEGABYTE, Result, moved, setup};

#[test]
fn the_json_is_the_schema_of_the_contract() -> Result {
    moved(|on| {
        on.lab.client().download(MOVED, MEGABYTE)?;
        for (role, peer, deliver_to) in [(Role::Old, NEW, false), (Role::New, OLD, true)] {
            let status = on.setup.status(role)?;
            let tunnels = status.0["tunnels"].as_array().expect("tunnels");
            assert_eq!(tunnels.len(), 1);
            let tunnel = &tunnels[0];
            let text = |key: &str| tunnel[key].as_str().unwrap_or_default().to_owned();
            assert!(text("peer").contains(&peer.to_string()), "{status:?}");
            assert!(text("endpoint").contains(&peer.to_string()), "{status:?}");
            assert_eq!(text("role"), role.to_string());
            assert_eq!(text("state"), "up");
            assert!(["aes-256-gcm", "chacha20-poly1305"].contains(&text("cipher").as_str()));
            assert!(tunnel["handshake_age_s"].is_u64(), "{status:?}");
            assert!(tunnel["rtt_ms"].is_number() || tunnel["rtt_ms"].is_null());
            assert!((1280..=1500).contains(&tunnel["mtu"].as_u64().unwrap_or(0)));
            assert_eq!(tunnel["moved"], serde_json::json!([MOVED.to_string()]));
            if deliver_to {
                assert_eq!(text("deliver_to"), NEW.to_string());
                assert!(status.live_flows() >= 1, "{status:?}");
            }
            for key in ["live", "max", "evicted"] {
                assert!(tunnel["flows"][key].is_u64(), "flows.{key}: {status:?}");
            }
            for direction in ["rx", "tx"] {
                assert!(
                    tunnel[direction]["packets"].as_u64() > Some(10),
                    "{status:?}"
                );
                assert!(
                    tunnel[direction]["bytes"].as_u64() > Some(400),
                    "{status:?}"
                );
            }
            let (more, less) = match role {
                Role::Old => ("rx", "tx"),
                Role::New => ("tx", "rx"),
            };
            assert!(
                tunnel[more]["bytes"].as_u64() > Some(MEGABYTE),
                "{status:?}"
            );
            assert!(tunnel[more]["bytes"].as_u64() > tunnel[less]["bytes"].as_u64());
            assert!(tunnel["drops"].is_object(), "{status:?}");
        }
        Ok(())
    })
}

#[test]
fn a_cipher_named_on_one_server_is_used_on_both() -> Result {
    for cipher in ["aes-256-gcm", "chacha20-poly1305", "aegis-256x4"] {
        let lab = Lab::new()?;
        let setup = setup(&lab)?.args(Role::Old, &["--cipher", cipher]);
        let _application = Service::start(lab.new_server(), NEW)?;
        let daemons = setup.start_both()?;
        lab.client().upload(MOVED, MEGABYTE)?;
        lab.client().download(MOVED, MEGABYTE)?;
        for daemon in [&daemons.old, &daemons.new] {
            let status = daemon.status()?;
            assert_eq!(status.tunnel()["cipher"], cipher);
            assert_eq!(status.drops("open_auth"), 0);
        }
    }
    Ok(())
}

#[test]
fn the_text_says_the_same_to_people() -> Result {
    moved(|on| {
        for (role, peer) in [(Role::Old, NEW), (Role::New, OLD)] {
            let said = on.setup.run(role, &["status"])?;
            assert!(said.status.success(), "{said:?}");
            for part in ["up", &peer.to_string(), &MOVED.to_string()] {
                assert!(said.stdout.contains(part), "{part}: {}", said.stdout);
            }
        }
        Ok(())
    })
}

#[test]
fn without_a_daemon_there_is_one_line_and_an_exit_code() -> Result {
    let lab = Lab::new()?;
    let said = setup(&lab)?.run(Role::Old, &["status"])?;
    assert_eq!(said.status.code(), Some(4), "{said:?}");
    assert_eq!(said.stderr.lines().count(), 1, "{said:?}");
    Ok(())
}

#[test]
fn status_speaks_to_the_daemon_of_its_own_namespace() -> Result {
    moved(|mut on| {
        let pid = |role| on.setup.status(role).map(|status| status.0["pid"].clone());
        assert_eq!(pid(Role::Old)?, on.daemons.old.process().id());
        assert_eq!(pid(Role::New)?, on.daemons.new.process().id());
        Ok(())
    })
}

#[test]
fn two_pairs_on_one_machine_do_not_collide_with_default_settings() -> Result {
    let labs = [Lab::new()?, Lab::new()?];
    let mut running = Vec::new();
    for lab in &labs {
        let application = Service::start(lab.new_server(), NEW)?;
        let daemons = setup(lab)?.default_runtime_dir().start_both()?;
        running.push((application, daemons));
    }
    for (lab, (application, daemons)) in labs.iter().zip(running) {
        lab.client().get(MOVED)?.is_answered_by(NEW)?;
        assert_eq!(application.peers().len(), 1);
        daemons.terminate()?;
    }
    Ok(())
}
