//! `ipmoved demo`, as the README starts it.

use std::process::Command;
use std::time::Duration;

use ipmoved::lab::Namespace;

use crate::stage::{Result, exe};

#[test]
fn the_demo_sees_every_step_work() -> Result {
    // The namespace is there only so that the demo is killed if it hangs.
    let around = Namespace::new("around the demo")?;
    let mut demo = Command::new(exe());
    demo.arg("demo");
    let said = around.output(demo, Duration::from_secs(120))?;
    assert!(said.status.success(), "{}\n{}", said.stdout, said.stderr);
    assert!(said.stdout.matches('✓').count() >= 10, "{}", said.stdout);
    assert!(!said.stdout.contains('✗'), "{}", said.stdout);
    Ok(())
}
