//! The standard starts of tests: a lab in which the address has moved.

use std::path::Path;
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::topology::NEW;
use ipmoved::lab::{Daemon, DaemonSetup, Daemons, Lab, LabError, Service};

use crate::relay::Relay;

/// The result of a test. Its error is one sentence.
pub(crate) type Result<T = ()> = std::result::Result<T, LabError>;

/// One megabyte.
pub(crate) const MEGABYTE: u64 = 1 << 20;

/// The moved address of each family.
pub(crate) const FAMILIES: [&str; 2] = ["192.0.2.5", "2001:db8:a::5"];

/// How long a port must send nothing to count as silent.
pub(crate) const SILENCE: Duration = Duration::from_millis(700);

/// How long a living path may take for a reply, on a machine that others keep busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// How long a connection may take to live on after a crash. TCP tries again after 0.2, 0.4, 0.8,
/// 1.6, 3.2 and 6.4 s.
pub(crate) const RECOVERY: Duration = Duration::from_secs(15);

/// The binary under test.
pub(crate) fn exe() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_ipmoved"))
}

/// A lab with the application on the new server and both daemons up.
pub(crate) struct Moved<'lab> {
    pub(crate) lab: &'lab Lab,
    pub(crate) setup: DaemonSetup<'lab>,
    pub(crate) application: Service,
    pub(crate) daemons: Daemons<'lab>,
}

/// Runs a test on this stage.
pub(crate) fn moved<T>(test: impl FnOnce(Moved<'_>) -> Result<T>) -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let application = Service::start(lab.new_server(), NEW)?;
    let daemons = setup.start_both()?;
    test(Moved {
        lab: &lab,
        setup,
        application,
        daemons,
    })
    .map(drop)
}

/// The daemon of one side, and the other one.
pub(crate) fn split(daemons: Daemons<'_>, role: Role) -> (Daemon<'_>, Daemon<'_>) {
    match role {
        Role::Old => (daemons.old, daemons.new),
        Role::New => (daemons.new, daemons.old),
    }
}

/// The reverse: the daemon of one side, and the other one.
pub(crate) fn join<'lab>(role: Role, one: Daemon<'lab>, other: Daemon<'lab>) -> Daemons<'lab> {
    let (old, new) = match role {
        Role::Old => (one, other),
        Role::New => (other, one),
    };
    Daemons { old, new }
}

/// A lab with the application on the new server and a relay between the servers, without daemons.
pub(crate) struct Relayed<'lab> {
    pub(crate) lab: &'lab Lab,
    pub(crate) relay: &'lab Relay,
    pub(crate) setup: DaemonSetup<'lab>,
}

/// Runs a test on the stage with the relay.
pub(crate) fn relayed(test: impl FnOnce(Relayed<'_>) -> Result) -> Result {
    let lab = Lab::new()?;
    let relay = Relay::start(&lab)?;
    let setup = Relay::setup(&lab)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    test(Relayed {
        lab: &lab,
        relay: &relay,
        setup,
    })
}

/// Whether this kernel is older than a version.
pub(crate) fn is_before(version: (u32, u32)) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse::<u32>().ok();
    number().zip(number()).is_some_and(|it| it < version)
}

/// The warnings that `status` shows on one server. Kernels without Landlock are warned of for as
/// long as a daemon runs, and no test is about them.
pub(crate) fn warnings(setup: &DaemonSetup<'_>, role: Role) -> Result<Vec<String>> {
    let status = setup.status(role)?.0;
    let all = status["warnings"].as_array().into_iter().flatten();
    let all = all.filter_map(|warning| warning.as_str().map(str::to_owned));
    Ok(all.filter(|text| !text.contains("no Landlock")).collect())
}

/// The daemons of a lab with the command lines of the README, not started.
pub(crate) fn setup(lab: &Lab) -> Result<DaemonSetup<'_>> {
    DaemonSetup::new(lab, exe())
}
