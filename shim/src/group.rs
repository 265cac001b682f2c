//! Which containers share a VM, from the annotations of their specs.
//!
//! CRI's daemons say which sandbox a container belongs to and which of them is the sandbox itself. With some settings a pod's author can
//! add annotations (containerd's `pod_annotations`; CRI-O passes on what it does not know), and another pod's sandbox is one annotation
//! away: so annotations that contradict each other are refused, none is preferred.

use capsid_owner::escape::Line;
use std::collections::HashMap;

/// Annotations that name the sandbox: containerd's (internal/cri/annotations), CRI-O's (internal/annotations).
const SANDBOX_IDS: [&str; 2] = [
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.SandboxID",
];
/// Annotations that say whether a container is the sandbox: `sandbox` or `container`.
const KINDS: [&str; 2] = [
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri-o.ContainerType",
];
/// The annotation that groups containers without CRI (cmd/containerd-shim-runc-v2/manager).
const RUNC_GROUP: &str = "io.containerd.runc.v2.group";

/// With whom a container shares its VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Group {
    /// With nobody: ctr, nerdctl, Docker.
    Alone,
    /// It is the sandbox (pause) container of a pod, the first of it.
    Sandbox,
    /// It belongs to the pod with this sandbox, which was there before.
    Of(String),
    /// With all that carry the same label; the first one of them starts the VM.
    Label(String),
}

impl Group {
    /// The name that all of a group have, for container `id`.
    pub fn name<'a>(&'a self, id: &'a str) -> &'a str {
        match self {
            Group::Alone | Group::Sandbox => id,
            Group::Of(name) | Group::Label(name) => name,
        }
    }
}

/// Why annotations are refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadGroup {
    /// Two that name different things.
    #[error("annotations {0} and {1} contradict each other")]
    Contradiction(&'static str, &'static str),
    /// Neither sandbox nor container.
    #[error("annotation {0} is {1:?}, expected sandbox or container")]
    Kind(&'static str, String),
    /// A sandbox of another name than its own.
    #[error("container {id} is a sandbox by annotation {kind}, but {named} names another")]
    OtherSandbox {
        /// The container.
        id: String,
        /// What says that it is one.
        kind: &'static str,
        /// What names another.
        named: &'static str,
    },
    /// A container of a pod that says not which.
    #[error("annotation {0} is there, but none that names the sandbox")]
    NoSandbox(&'static str),
}

/// The group of container `id` with these annotations.
///
/// # Errors
/// They contradict each other.
pub fn of(id: &str, annotations: &HashMap<String, String>) -> Result<Group, BadGroup> {
    let sandbox = one_of(&SANDBOX_IDS, annotations)?;
    let kind = one_of(&KINDS, annotations)?;
    let label = one_of(&[RUNC_GROUP], annotations)?;
    if let (Some((by, sandbox)), Some((_, label))) = (sandbox, label) {
        if sandbox != label {
            return Err(BadGroup::Contradiction(by, RUNC_GROUP));
        }
    }
    match (kind, sandbox, label) {
        (Some((_, "sandbox")), Some((_, sandbox)), _) if sandbox == id => Ok(Group::Sandbox),
        (Some((kind, "sandbox")), Some((named, _)), _) => Err(BadGroup::OtherSandbox {
            id: id.to_owned(),
            kind,
            named,
        }),
        (Some((_, "container")), Some((_, sandbox)), _) => Ok(Group::Of(sandbox.to_owned())),
        (Some((by, "sandbox" | "container")), None, _) => Err(BadGroup::NoSandbox(by)),
        (Some((by, other)), _, _) => Err(BadGroup::Kind(by, Line(other.as_bytes()).to_string())),
        (None, Some((_, name)), _) | (None, None, Some((_, name))) if name != id => {
            Ok(Group::Label(name.to_owned()))
        }
        (None, _, _) => Ok(Group::Alone),
    }
}

/// The value that the names have in common, with the first name that has it; an empty value is none.
fn one_of<'a>(
    names: &[&'static str],
    annotations: &'a HashMap<String, String>,
) -> Result<Option<(&'static str, &'a str)>, BadGroup> {
    let mut found = None;
    for name in names {
        let value = annotations.get(*name).filter(|value| !value.is_empty());
        match (found, value) {
            (Some((first, one)), Some(other)) if one != other => {
                return Err(BadGroup::Contradiction(first, name));
            }
            (None, Some(value)) => found = Some((*name, value.as_str())),
            _ => {}
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CRI_ID: &str = SANDBOX_IDS[0];
    const CRI_KIND: &str = KINDS[0];
    const CRI_O_ID: &str = SANDBOX_IDS[1];
    const CRI_O_KIND: &str = KINDS[1];

    fn grouped(id: &str, annotations: &[(&str, &str)]) -> Result<Group, BadGroup> {
        let pairs = annotations.iter();
        of(
            id,
            &pairs.map(|(k, v)| (k.to_string(), v.to_string())).collect(),
        )
    }

    #[test]
    fn without_annotations_a_container_is_alone() {
        assert_eq!(grouped("c", &[]), Ok(Group::Alone));
        assert_eq!(grouped("c", &[(CRI_ID, "")]), Ok(Group::Alone));
        assert_eq!(grouped("c", &[("other", "x")]), Ok(Group::Alone));
    }

    #[test]
    fn both_daemons_sandboxes_and_containers_are_told_apart() {
        for (id, kind) in [(CRI_ID, CRI_KIND), (CRI_O_ID, CRI_O_KIND)] {
            let sandbox = grouped("s", &[(id, "s"), (kind, "sandbox")]);
            assert_eq!(sandbox, Ok(Group::Sandbox));
            let container = grouped("c", &[(id, "s"), (kind, "container")]);
            assert_eq!(container, Ok(Group::Of("s".into())));
        }
    }

    #[test]
    fn the_label_groups_and_so_does_a_sandbox_id_alone() {
        assert_eq!(
            grouped("c", &[(RUNC_GROUP, "g")]),
            Ok(Group::Label("g".into()))
        );
        assert_eq!(grouped("g", &[(RUNC_GROUP, "g")]), Ok(Group::Alone));
        assert_eq!(grouped("c", &[(CRI_ID, "s")]), Ok(Group::Label("s".into())));
        assert_eq!(grouped("s", &[(CRI_ID, "s")]), Ok(Group::Alone));
    }

    #[test]
    fn no_annotation_leads_into_another_pod() {
        let own = [(CRI_O_ID, "s"), (CRI_O_KIND, "sandbox")];
        let forged = grouped("s", &[own[0], own[1], (CRI_ID, "victim")]);
        assert_eq!(forged, Err(BadGroup::Contradiction(CRI_ID, CRI_O_ID)));
        let forged = grouped("s", &[own[0], own[1], (RUNC_GROUP, "victim")]);
        assert_eq!(forged, Err(BadGroup::Contradiction(CRI_O_ID, RUNC_GROUP)));
        let forged = grouped("s", &[own[0], own[1], (CRI_KIND, "container")]);
        assert_eq!(forged, Err(BadGroup::Contradiction(CRI_KIND, CRI_O_KIND)));
        let forged = grouped("s", &[(CRI_ID, "victim"), (CRI_KIND, "sandbox")]);
        assert!(
            matches!(forged, Err(BadGroup::OtherSandbox { .. })),
            "{forged:?}"
        );
    }

    #[test]
    fn half_a_pod_is_refused() {
        assert_eq!(
            grouped("c", &[(CRI_KIND, "container")]),
            Err(BadGroup::NoSandbox(CRI_KIND))
        );
        let kind = grouped("c", &[(CRI_ID, "s"), (CRI_KIND, "po\nd")]);
        assert_eq!(kind, Err(BadGroup::Kind(CRI_KIND, "po\\nd".into())));
    }

    proptest! {
        #[test]
        fn any_values_are_a_group_of_a_name_given_or_refused(
            id in "[ab]{1,2}",
            values in proptest::collection::vec("[ab]{0,2}|sandbox|container", 5),
        ) {
            let names = [CRI_ID, CRI_O_ID, CRI_KIND, CRI_O_KIND, RUNC_GROUP];
            let pairs: Vec<(&str, &str)> = names.into_iter().zip(values.iter().map(String::as_str)).collect();
            if let Ok(group) = grouped(&id, &pairs) {
                let name = group.name(&id);
                // Every id that is given agrees with the one that was taken.
                for (key, value) in &pairs {
                    if [CRI_ID, CRI_O_ID, RUNC_GROUP].contains(key) && !value.is_empty() {
                        prop_assert_eq!(*value, name);
                    }
                }
            }
        }
    }
}
