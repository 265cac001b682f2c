//! Hooks, run for real.

use super::*;
use serde_json::{Value, json};
use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

/// A bundle that is gone with the test.
struct Bundle(PathBuf);

impl Bundle {
    fn new() -> Bundle {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "capsid-hooks-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).expect("made");
        Bundle(path)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.0.join(name)).expect("a file that a hook wrote")
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).expect("removed");
    }
}

fn shell(script: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["hook", "-c", script], "env": ["PATH=/usr/bin:/bin"]})
}

fn hooks(all: &Value) -> HostHooks {
    parsed(all).expect("hooks")
}

fn parsed(all: &Value) -> Result<HostHooks, Refusal> {
    let spec = json!({"ociVersion": "1.2.0", "hooks": all});
    let mut spec = serde_json::from_value(spec).expect("a spec");
    HostHooks::take(&mut spec)
}

fn poststart(script: &str) -> Vec<Hook> {
    hooks(&json!({"poststart": [shell(script)]})).started
}

async fn run_in(bundle: &Bundle, hooks: &[Hook]) -> Result<(), HookError> {
    let annotations = HashMap::from([("a".to_owned(), "b".to_owned())]);
    run(hooks, &state(bundle, &annotations)).await
}

fn state<'a>(bundle: &'a Bundle, annotations: &'a HashMap<String, String>) -> State<'a> {
    State {
        oci_version: "1.2.0",
        id: "c1",
        status: Status::Creating,
        pid: Some(42),
        bundle: &bundle.0,
        annotations,
    }
}

/// Whether the process has ended and was reaped.
fn is_gone(pid: &str) -> bool {
    !Path::new("/proc").join(pid.trim()).exists()
}

/// Whether it has ended. Where the first process reaps nobody, an orphan stays as a zombie.
fn has_ended(pid: &str) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid.trim()).join("stat"));
    stat.map_or(true, |stat| stat.contains(") Z ") || stat.contains(") X "))
}

/// Nothing tells when a process that is not our child ends, or when somebody else reaps.
async fn until(condition: impl Fn() -> bool) {
    let met = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let limit = Duration::from_secs(30);
    tokio::time::timeout(limit, met).await.expect("in time");
}

#[tokio::test]
async fn a_hook_gets_the_state_its_arguments_its_environment_and_the_bundle() {
    let bundle = Bundle::new();
    let script = "cat > state; echo \"$0 $*\" > args; env > env";
    let mut hook = shell(script);
    hook["args"] = json!(["a hook", "-c", script, "named", "first"]);
    run_in(&bundle, &hooks(&json!({"createRuntime": [hook]})).create)
        .await
        .expect("run");
    let state: Value = serde_json::from_str(&bundle.text("state")).expect("JSON");
    let expected = json!({"ociVersion": "1.2.0", "id": "c1", "status": "creating", "pid": 42,
                          "bundle": bundle.0, "annotations": {"a": "b"}});
    assert_eq!(state, expected);
    assert_eq!(bundle.text("args"), "named first\n");
    let env = bundle.text("env");
    let ours = env
        .lines()
        .filter(|line| !line.starts_with("PWD=") && !line.starts_with("_="));
    let ours: Vec<&str> = ours
        .filter(|line| !line.starts_with("SHLVL=") && !line.starts_with("OLDPWD="))
        .collect();
    assert_eq!(ours, ["PATH=/usr/bin:/bin"]);
}

#[tokio::test]
async fn a_stopped_container_has_no_pid() {
    let text = serde_json::to_string(&State {
        oci_version: "1.0.2",
        id: "c1",
        status: Status::Stopped,
        pid: None,
        bundle: Path::new("/b"),
        annotations: &HashMap::new(),
    });
    let expected =
        r#"{"ociVersion":"1.0.2","id":"c1","status":"stopped","bundle":"/b","annotations":{}}"#;
    assert_eq!(text.expect("JSON"), expected);
}

#[tokio::test]
async fn hooks_run_in_their_order_up_to_the_first_that_fails() {
    let bundle = Bundle::new();
    let all = hooks(&json!({
        "prestart": [shell("echo prestart >> ran")],
        "createRuntime": [shell("echo first >> ran; echo no network >&2; exit 7"), shell("echo second >> ran")]
    }));
    let error = run_in(&bundle, &all.create)
        .await
        .expect_err("failed")
        .to_string();
    assert_eq!(
        error,
        "hook /bin/sh ended with 7; its last words: no network"
    );
    assert_eq!(bundle.text("ran"), "prestart\nfirst\n");
}

#[tokio::test]
async fn every_hook_runs_where_failures_are_only_said() {
    let bundle = Bundle::new();
    let all = hooks(
        &json!({"poststop": [shell("kill -9 $$"), shell("echo second >> ran"), shell("exit 1")]}),
    );
    let annotations = HashMap::new();
    let failures = run_each(&all.stopped, &state(&bundle, &annotations)).await;
    let failures: Vec<String> = failures.iter().map(ToString::to_string).collect();
    assert_eq!(
        failures,
        [
            "hook /bin/sh was ended by signal 9",
            "hook /bin/sh ended with 1"
        ]
    );
    assert_eq!(bundle.text("ran"), "second\n");
}

#[tokio::test]
async fn a_hook_that_does_not_end_is_killed_with_its_children() {
    let bundle = Bundle::new();
    let mut hook = shell("sleep 1000 & echo $! > child; echo $$ > own; echo waiting >&2; wait");
    hook["timeout"] = json!(1);
    let started = Instant::now();
    let all = hooks(&json!({"createRuntime": [hook]}));
    let error = run_in(&bundle, &all.create)
        .await
        .expect_err("killed")
        .to_string();
    assert_eq!(
        error,
        "hook /bin/sh did not end within 1 s and was killed; its last words: waiting"
    );
    assert!(started.elapsed() >= Duration::from_secs(1));
    assert!(is_gone(&bundle.text("own")), "reaped before the answer");
    until(|| has_ended(&bundle.text("child"))).await;
}

#[tokio::test]
async fn a_hook_whose_caller_gives_up_is_killed_and_reaped() {
    let bundle = Bundle::new();
    rustix::fs::mkfifoat(rustix::fs::CWD, bundle.0.join("own"), 0o600.into()).expect("a pipe");
    let all = poststart("echo $$ > own; exec sleep 1000");
    let own = bundle.0.join("own");
    // The hook is at its place when it has written to the pipe.
    let pid = tokio::select! {
        ended = run_in(&bundle, &all) => panic!("ended: {ended:?}"),
        pid = tokio::task::spawn_blocking(move || fs::read_to_string(own)) => pid.expect("read").expect("a pid"),
    };
    until(|| is_gone(&pid)).await;
}

#[tokio::test]
async fn a_process_that_a_hook_leaves_behind_is_not_waited_for() {
    let bundle = Bundle::new();
    let started = Instant::now();
    run_in(&bundle, &poststart("sleep 1000 & echo $! > child; exit 0"))
        .await
        .expect("ended");
    let child = bundle.text("child");
    assert!(!is_gone(&child), "and it is left alone");
    assert!(started.elapsed() < Duration::from_secs(900));
    let pid = Pid::from_raw(child.trim().parse().expect("a pid")).expect("a pid");
    rustix::process::kill_process(pid, Signal::KILL).expect("killed");
}

#[tokio::test]
async fn a_hook_that_says_much_is_heard_to_its_end_and_quoted_shortly() {
    let bundle = Bundle::new();
    let script = "i=0; while [ $i -lt 20000 ]; do echo \"line $i of what nobody reads\" >&2; i=$((i+1)); done; printf 'the\\033cause' >&2; exit 1";
    let error = run_in(&bundle, &poststart(script))
        .await
        .expect_err("failed")
        .to_string();
    assert!(
        error.ends_with("line 19999 of what nobody reads | the\\u{1b}cause"),
        "{error}"
    );
    assert!(error.len() < 400, "{error}");
}

#[tokio::test]
async fn a_hook_that_does_not_read_its_state_is_run() {
    let bundle = Bundle::new();
    let annotations = HashMap::from([("big".to_owned(), "x".repeat(1 << 20))]);
    let all = poststart("exit 0");
    run(&all, &state(&bundle, &annotations)).await.expect("run");
}

#[tokio::test]
async fn a_program_that_is_not_there_is_named() {
    let bundle = Bundle::new();
    let all = hooks(&json!({"prestart": [{"path": "/no/such/hook"}]}));
    let error = run_in(&bundle, &all.create)
        .await
        .expect_err("nothing to run");
    assert!(matches!(error, HookError::Execute { .. }));
    assert_eq!(error.to_string(), "cannot execute hook /no/such/hook");
}

#[test]
fn hooks_that_cannot_run_are_refused() {
    let table = [
        (
            json!({"prestart": [{"path": "bin/x"}]}),
            "hooks.prestart[0].path",
        ),
        (
            json!({"createRuntime": [{"path": "/x", "timeout": 0}]}),
            "hooks.createRuntime[0].timeout",
        ),
        (
            json!({"poststart": [{"path": "/x", "timeout": 3601}]}),
            "hooks.poststart[0].timeout",
        ),
        (
            json!({"poststop": [{"path": "/x"}, {"path": "/x", "env": ["A"]}]}),
            "hooks.poststop[1].env",
        ),
        (
            json!({"poststop": [{"path": "/x", "env": ["=b"]}]}),
            "hooks.poststop[0].env",
        ),
        (
            json!({"prestart": vec![json!({"path": "/x"}); 65]}),
            "hooks.prestart",
        ),
    ];
    for (all, field) in table {
        assert_eq!(parsed(&all).expect_err("refused").field, field);
    }
    assert_eq!(parsed(&Value::Null).expect("none"), HostHooks::default());
}
