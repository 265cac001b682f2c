//! What holds for every spec: it is translated or refused, and no path of the host is left in what is translated.

use super::engines::{self, CONTAINER, SANDBOX};
use super::*;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Value, json};

/// A name that only paths of the host have here.
const MARK: &str = "only-on-the-host";

fn role() -> impl Strategy<Value = Role<'static>> {
    select(vec![
        Role::Alone,
        Role::Pause,
        Role::Member { sandbox: SANDBOX },
    ])
}

fn engine() -> impl Strategy<Value = Value> {
    select(vec![
        engines::cri_pause(),
        engines::cri_1_7(),
        engines::cri_2(),
        engines::crio(),
        engines::ctr(),
        engines::nerdctl(),
        engines::docker(),
    ])
}

fn translated(spec: &Spec, role: Role<'_>) -> Result<GuestSpec, Refusal> {
    let context = Context {
        id: CONTAINER,
        bundle: Path::new("/only-on-the-host/bundle"),
        role,
    };
    translate(spec, &context)
}

/// Any JSON that is not deep.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        select(vec![
            "bind",
            "/proc/1/ns/pid",
            "/",
            "..",
            "/sys/..",
            "a.slice:b:c",
            "::",
            "ro"
        ])
        .prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        let name = select(vec!["type", "path", "source", "options", "limit", "x"]);
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            vec((name, inner), 0..4).prop_map(|fields| fields.into_iter().collect()),
        ]
    })
}

/// Puts `new` where the turns lead to.
fn replace(spec: &mut Value, turns: &[usize], new: Value) {
    let Some((turn, rest)) = turns.split_first() else {
        *spec = new;
        return;
    };
    let child = match spec {
        Value::Object(fields) if !fields.is_empty() => {
            let nth = turn % fields.len();
            fields.values_mut().nth(nth)
        }
        Value::Array(items) if !items.is_empty() => {
            let nth = turn % items.len();
            items.get_mut(nth)
        }
        _ => None,
    };
    match child {
        Some(child) => replace(child, rest, new),
        None => *spec = new,
    }
}

/// A mount whose source is the host's, whatever its type.
fn mount() -> impl Strategy<Value = Value> {
    let kind = select(vec![
        json!("bind"),
        json!("none"),
        Value::Null,
        json!("tmpfs"),
        json!("proc"),
        json!("sysfs"),
        json!("cgroup"),
    ]);
    let source = select(vec![
        "/srv",
        "/proc/..",
        "/dev/shm",
        "/sys/fs",
        "",
        "relative",
        "/run/capsid/pod",
    ]);
    let option = select(vec![
        "bind", "rbind", "ro", "rw", "rshared", "rslave", "nosuid", "size=64k",
    ]);
    let place = select(vec!["/data", "/dev/shm", "/etc/hosts", "/sys"]);
    (kind, source, vec(option, 0..4), place).prop_map(|(kind, source, options, place)| {
        json!({"destination": place, "type": kind, "source": format!("{source}/{MARK}"), "options": options})
    })
}

/// A path of the host in each field that can have one.
fn mark(spec: &mut Value, mounts: &[Value]) {
    let path = format!("/{MARK}/x");
    spec["root"]["path"] = json!(path);
    if let Some(all) = spec["mounts"].as_array_mut() {
        all.extend(mounts.iter().cloned());
    }
    spec["linux"]["cgroupsPath"] = json!(path);
    for entry in spec["linux"]["namespaces"]
        .as_array_mut()
        .into_iter()
        .flatten()
    {
        if entry["path"].is_string() && entry["type"] != "pid" {
            entry["path"] = json!(path);
        }
    }
    let hook = json!([{"path": path, "args": [path], "env": [format!("A={path}")]}]);
    spec["hooks"] =
        json!({"prestart": hook, "createRuntime": hook, "poststart": hook, "poststop": hook});
    spec["annotations"]["where"] = json!(path);
}

/// Whether a source is one that the guest has without the host.
fn is_guest_s(source: &str) -> bool {
    let own = ["/proc", "/sys", "/dev/"]
        .iter()
        .any(|own| source.starts_with(own));
    own || source == "/run/capsid/pod/shm" || !source.contains('/')
}

proptest! {
    #[test]
    fn any_text_is_translated_or_refused(text: String, role in role()) {
        if let Ok(spec) = serde_json::from_str::<Spec>(&text) {
            let _either = translated(&spec, role);
        }
    }

    #[test]
    fn any_spec_is_translated_or_refused(
        mut spec in engine(),
        changes in vec((vec(any::<usize>(), 1..6), value()), 1..4),
        role in role(),
    ) {
        for (turns, new) in changes {
            replace(&mut spec, &turns, new);
        }
        if let Ok(spec) = serde_json::from_value::<Spec>(spec) {
            if let Err(refusal) = translated(&spec, role) {
                let said = refusal.to_string();
                prop_assert!(said.starts_with("config.json: ") && !said.contains(char::is_control), "{said}");
            }
        }
    }

    #[test]
    fn no_path_of_the_host_is_left(mut spec in engine(), mounts in vec(mount(), 0..6), role in role()) {
        mark(&mut spec, &mounts);
        let spec: Spec = serde_json::from_value(spec).expect("a spec");
        let Ok(guest) = translated(&spec, role) else {
            return Ok(());
        };
        let text = String::from_utf8(guest.json).expect("JSON");
        // The host's own /proc and /sys are not reached by a path below the guest's.
        let text = text.replace(&format!("/sys/fs/{MARK}"), "");
        prop_assert!(!text.contains(MARK), "{text}");
        if role == Role::Pause {
            return Ok(());
        }
        let json: Value = serde_json::from_str(&text).expect("JSON");
        let volumes = format!("/run/capsid/share/{CONTAINER}/volumes/");
        let mut next = 0;
        for mount in json["mounts"].as_array().into_iter().flatten() {
            let source = mount["source"].as_str().expect("a source");
            match source.strip_prefix(&volumes) {
                Some(index) => {
                    prop_assert_eq!(index, next.to_string());
                    next += 1;
                }
                None => prop_assert!(is_guest_s(source), "{}", source),
            }
        }
        prop_assert_eq!(next, guest.volumes.len());
        prop_assert!(guest.volumes.iter().all(|volume| volume.source.is_absolute()));
    }
}
