//! The shim under real containerds: what `ctr` asks of them works, and leaves nothing.
//!
//! A scenario is a function of a containerd; `each_containerd!` makes of it a test under each release, named
//! `RUNTIME::RELEASE::SCENARIO`. Each test has a containerd of its own. Run them one at a time (`--test-threads=1`): the
//! ledger counts the host. Some run with containerd's own shim and runc as well; a new one is to pass with that one, which shows
//! that it asks of ours what a shim can do.

#[path = "containerd/crio.rs"]
mod crio;
#[path = "containerd/events.rs"]
mod events;
#[path = "containerd/faults.rs"]
mod faults;
#[path = "containerd/leaks.rs"]
mod leaks;
#[path = "containerd/restarts.rs"]
mod restarts;
#[path = "containerd/spec.rs"]
mod spec;
#[path = "containerd/streams.rs"]
mod streams;
#[path = "containerd/tasks.rs"]
mod tasks;
#[path = "containerd/tty.rs"]
mod tty;

/// Tests of scenarios: `all` there are, or a `few`, which show that the harness asks what a shim can answer.
macro_rules! scenarios {
    (all, $release:expr, $runtime:expr) => {
        scenarios! { $release, $runtime;
            events::an_oom_is_told_and_is_137,
            events::events_come_in_order,
            leaks::delete_leaves_nothing,
            restarts::containerd_restarted_with_running_containers,
            restarts::containerd_killed_with_running_containers,
            restarts::an_exit_while_containerd_is_down_is_seen_later,
            spec::flags_hold_in_the_container,
            spec::volumes_are_shared_and_read_only_ones_are,
            streams::output_goes_to_a_file,
            streams::output_goes_to_a_logger,
            streams::output_of_64_mib_has_its_checksum,
            streams::stdin_reaches_the_container_and_ends,
            tasks::a_signal_reaches_the_container,
            tasks::attach_again,
            tasks::exec_in_a_running_container,
            tasks::kill_is_137,
            tasks::metrics_are_there,
            tasks::pause_and_resume,
            tasks::run_prints_and_exits_with_the_code,
            tasks::task_ls_shows_the_pid_and_status,
            tasks::task_ps_shows_the_pid,
            tty::a_terminal_has_its_size_and_follows_it,
            tty::an_exec_has_a_terminal_of_its_own,
        }
    };
    (few, $release:expr, $runtime:expr) => {
        scenarios! { $release, $runtime;
            events::events_come_in_order,
            leaks::delete_leaves_nothing,
            restarts::an_exit_while_containerd_is_down_is_seen_later,
            streams::stdin_reaches_the_container_and_ends,
            tasks::exec_in_a_running_container,
        }
    };
    ($release:expr, $runtime:expr; $($room:ident::$scenario:ident,)+) => {
        $(
            #[test]
            fn $scenario() {
                let mut daemon = capsid_tests::containerd::Daemon::start($release, $runtime);
                crate::$room::$scenario(&mut daemon);
            }
        )+
    };
}

/// The scenarios with one runtime, under each release.
macro_rules! each_containerd {
    ($name:ident, $runtime:expr, $which:ident) => {
        mod $name {
            mod crio {
                #[test]
                fn a_pod_of_crio_lives_and_dies() {
                    crate::crio::a_pod_of_crio_lives_and_dies($runtime);
                }

                #[test]
                fn a_restarted_crio_finds_its_container() {
                    crate::crio::a_restarted_crio_finds_its_container($runtime);
                }
            }
            mod v1_7 {
                scenarios!($which, capsid_tests::containerd::Release::V1_7, $runtime);
            }
            mod v2_1 {
                scenarios!($which, capsid_tests::containerd::Release::V2_1, $runtime);
            }
            mod v2_3 {
                scenarios!($which, capsid_tests::containerd::Release::V2_3, $runtime);
            }
        }
    };
}

each_containerd!(runc, capsid_tests::containerd::Runtime::Runc, few);
each_containerd!(capsid, capsid_tests::containerd::Runtime::Capsid, all);

/// The scenarios of what only Capsid has.
macro_rules! of_vms {
    ($release:ident) => {
        scenarios! {
            capsid_tests::containerd::Release::$release, capsid_tests::containerd::Runtime::Capsid;
            faults::a_killed_shim_leaves_nothing,
            faults::a_killed_vmm_is_137_for_its_container,
            faults::a_pod_is_one_vm,
            faults::a_vm_that_stands_still_is_answered_for_and_killed,
            faults::shims_are_small,
        }
    };
}

mod vms {
    mod v1_7 {
        of_vms!(V1_7);
    }
    mod v2_1 {
        of_vms!(V2_1);
    }
    mod v2_3 {
        of_vms!(V2_3);
    }
}
