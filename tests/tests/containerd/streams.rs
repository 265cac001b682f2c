//! Nothing that goes in or comes out is lost, reordered or invented.

use capsid_tests::command::eventually;
use capsid_tests::containerd::Daemon;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

/// How much goes through, in MiB.
const BIG_MIB: usize = 64;

/// The checksum of a file's contents, in hex.
fn checksum(path: &str) -> String {
    let output = Command::new("md5sum")
        .stdin(File::open(path).expect("a file of ours"))
        .stderr(Stdio::inherit())
        .output()
        .expect("md5sum is on PATH");
    first_word(&String::from_utf8_lossy(&output.stdout))
}

fn first_word(text: &str) -> String {
    let word = text.split_whitespace().next().expect("a checksum");
    assert_eq!(word.len(), 32, "a checksum: {text:?}");
    word.to_owned()
}

pub(crate) fn output_of_64_mib_has_its_checksum(daemon: &Daemon) {
    let path = daemon.file("output");
    // The container says on standard error what it wrote on standard output.
    let script = format!(
        "dd if=/dev/urandom of=/data bs=1M count={BIG_MIB} 2>/dev/null; cat /data; md5sum /data >&2"
    );
    let ended = daemon
        .run(&["--rm"], "one", &script)
        .output_to(File::create(&path).expect("a directory of ours"))
        .wait();
    ended.exits(0);
    let length = fs::metadata(&path).expect("a file of ours").len();
    assert_eq!(length, (BIG_MIB as u64) << 20);
    assert_eq!(checksum(&path), first_word(&ended.stderr));
}

/// `ctr` tells containerd of the end of its input only if that comes after the start of the task (containerd, cmd/ctr/commands/tasks,
/// `stdinCloser`), so the container says first that it is there.
pub(crate) fn stdin_reaches_the_container_and_ends(daemon: &Daemon) {
    let through = |id: &str, script: &str, bytes: &[u8]| {
        let script = format!("echo up; {script}");
        let mut running = daemon.run(&["--rm"], id, &script).typed().start();
        running.until("up\n");
        running.types(bytes);
        running.wait().exits(0).text()
    };
    assert_eq!(through("one", "wc -c", b"twelve bytes").trim(), "12");
    assert_eq!(through("two", "wc -c", b"").trim(), "0");

    let path = daemon.file("input");
    let mut random = File::open("/dev/urandom").expect("/dev/urandom");
    let mut file = File::create(&path).expect("a directory of ours");
    let wanted = (BIG_MIB as u64) << 20;
    let made = std::io::copy(&mut std::io::Read::take(&mut random, wanted), &mut file);
    assert_eq!(made.expect("written"), wanted);
    let bytes = fs::read(&path).expect("a file of ours");
    let sum = through("three", "md5sum", &bytes);
    assert_eq!(first_word(&sum), checksum(&path));
}

pub(crate) fn output_goes_to_a_file(daemon: &Daemon) {
    let path = daemon.file("log");
    let uri = format!("file://{path}");
    for line in ["first", "second"] {
        daemon
            .run(
                &["--detach", "--log-uri", &uri],
                line,
                &format!("echo {line}"),
            )
            .wait()
            .exits(0);
        daemon.reaches(line, "STOPPED");
        assert_eq!(daemon.delete(line), 0);
    }
    let text = fs::read_to_string(&path).expect("the shim makes it");
    assert_eq!(text, "first\nsecond\n");
}

/// A logger of the scheme `binary` (containerd, core/runtime/v2/logging): the outputs are its descriptors 3 and 4, and by closing 5
/// it says that it reads them. What stands behind the `?` are its arguments. A shim may send it SIGTERM once the container is deleted.
const LOGGER: &str = "#!/bin/sh
trap '' TERM
exec 5>&-
cat <&3 > $2.out &
cat <&4 > $2.err
wait
echo $1 $CONTAINER_ID $CONTAINER_NAMESPACE > $2.end
";

pub(crate) fn output_goes_to_a_logger(daemon: &Daemon) {
    let (logger, place) = (daemon.file("logger"), daemon.file("place"));
    fs::write(&logger, LOGGER).expect("a directory of ours");
    fs::set_permissions(&logger, Permissions::from_mode(0o700)).expect("a file of ours");
    let uri = format!("binary://{logger}?to={place}");
    let script = "echo out; echo err >&2";
    let flags = ["--detach", "--log-uri", &uri];
    daemon.run(&flags, "one", script).wait().exits(0);
    daemon.reaches("one", "STOPPED");
    assert_eq!(daemon.delete("one"), 0);
    let text = |end: &str| fs::read_to_string(format!("{place}.{end}")).unwrap_or_default();
    eventually("the logger ends", || text("end") == "to one default\n");
    assert_eq!(
        (text("out"), text("err")),
        ("out\n".to_owned(), "err\n".to_owned())
    );
}
