//! Network cards, as Linux in the guest uses them. Each test has a network namespace of its own, with one link to its guest.

use capsid_tests::tap::{GUEST, HOST, taps};
use capsid_tests::vmm::{Ended, Nic, run_script};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;

/// The guest powered itself off.
const POWERED_OFF: i32 = 0;
const MAC: &str = "02:00:00:00:00:2a";
/// What goes through a connection each way, bytes.
const STREAM_BYTES: usize = 4 << 20;

/// Runs `script` in a guest whose link is up, while the host takes one stream on port 1000 and gives one on port 2000. How the
/// guest ended, and what came.
fn with_link(queues: usize, cpus: u64, mtu: u16, script: &str) -> (Ended, Vec<u8>) {
    let script = format!("ip link set eth0 up && ip address add {GUEST}/24 dev eth0\n{script}");
    let test = move || {
        let nic = Nic {
            taps: taps(queues, mtu).expect("a tap device"),
            mac: MAC.to_owned(),
            mtu,
        };
        let (takes, gives) = (listener(1000), listener(2000));
        let given = thread::spawn(move || {
            let (mut stream, _) = gives.accept().expect("a connection");
            stream.write_all(&[b'y'; STREAM_BYTES]).expect("given");
        });
        let taken = thread::spawn(move || {
            let (mut stream, _) = takes.accept().expect("a connection");
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).expect("taken");
            bytes
        });
        let ended = run_script(&script, cpus, &[], &[nic]);
        assert_eq!(ended.code, POWERED_OFF, "{ended:?}");
        assert_eq!(
            ended.said.last().map(String::as_str),
            Some("done"),
            "{ended:?}"
        );
        given.join().expect("given");
        (ended, taken.join().expect("taken"))
    };
    // On a thread of its own, whose namespace goes with it.
    thread::spawn(test).join().expect("the test")
}

fn listener(port: u16) -> TcpListener {
    TcpListener::bind((HOST, port)).expect("the host's address")
}

/// Both streams, as the guest's half: it says whether what came is what the host gives.
fn streams() -> String {
    format!(
        "head -c {STREAM_BYTES} /dev/zero | tr '\\0' x | nc {HOST} 1000\n\
         head -c {STREAM_BYTES} /dev/zero | tr '\\0' y | md5sum > /expected\n\
         nc {HOST} 2000 < /dev/null | md5sum | cmp - /expected && say same\n"
    )
}

fn is_whole(stream: &[u8]) -> bool {
    stream.len() == STREAM_BYTES && stream.iter().all(|byte| *byte == b'x')
}

#[test]
fn a_guest_and_its_host_talk_both_ways() {
    let script = format!(
        "ping -q -c 3 {HOST} > /dev/null && say pinged\n{}\
         say $(cat /sys/class/net/eth0/address) $(cat /sys/class/net/eth0/mtu)\nsay done",
        streams()
    );
    let (ended, taken) = with_link(1, 1, 1400, &script);
    assert_eq!(
        ended.said,
        ["pinged", "same", &format!("{MAC} 1400"), "done"]
    );
    assert!(is_whole(&taken), "{} bytes", taken.len());
}

#[test]
fn a_card_of_several_queues_has_them_in_the_guest() {
    let script = format!(
        "say $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l)\n{}say done",
        streams()
    );
    let (ended, taken) = with_link(2, 2, 9000, &script);
    assert_eq!(ended.said, ["2", "same", "done"]);
    assert!(is_whole(&taken), "{} bytes", taken.len());
}
