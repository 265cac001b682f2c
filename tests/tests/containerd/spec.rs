//! What a person asks of a container with a flag is in its specification, and holds in the container.

use capsid_tests::containerd::Daemon;
use std::fs;

pub(crate) fn flags_hold_in_the_container(daemon: &Daemon) {
    let flags = [
        "--rm",
        "--read-only",
        "--user=1000:1001",
        "--env=GREETING=hello",
        "--cwd=/var",
    ];
    let script = "id -u; id -g; pwd; echo $GREETING; touch /file 2>&1";
    let ended = daemon.run(&flags, "one", script).wait();
    ended.exits(1);
    assert_eq!(
        ended.text(),
        "1000\n1001\n/var\nhello\ntouch: /file: Read-only file system\n"
    );
}

pub(crate) fn volumes_are_shared_and_read_only_ones_are(daemon: &Daemon) {
    let mounts = ["rw", "ro"].map(|name| {
        let path = daemon.file(name);
        fs::create_dir(&path).expect("a directory of ours");
        fs::write(format!("{path}/given"), format!("in {name}\n")).expect("a directory of ours");
        format!("--mount=type=bind,src={path},dst=/{name},options=rbind:{name}")
    });
    let script = "cat /rw/given /ro/given; echo made > /rw/made; touch /ro/made 2>&1";
    let flags = ["--rm", &mounts[0], &mounts[1]];
    let ended = daemon.run(&flags, "one", script).wait();
    ended.exits(1);
    assert_eq!(
        ended.text(),
        "in rw\nin ro\ntouch: /ro/made: Read-only file system\n"
    );
    let made = fs::read_to_string(format!("{}/made", daemon.file("rw")));
    assert_eq!(made.expect("the container made it"), "made\n");
}
