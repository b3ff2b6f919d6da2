//! The files under configs/ and docs/ against the program: configurations resolve on the clusters they were made for, what
//! dashboards and alerts ask for exists, and manifests hold nothing that Kubernetes does not know.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use moeyard::cli::cluster::ClusterPlan;
use moeyard::config::flags::QuantizeChoice;
use moeyard::config::{RawOptions, file};
use moeyard::metrics::{FAMILIES, Kind};
use moeyard::model::families;
use moeyard::spec::ModelSpec;
use router_sim::topology::Cluster;
use serde::Deserialize;
use serde_json::Value;

fn path(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(relative)
}

fn text(relative: &str) -> String {
    fs::read_to_string(path(relative)).unwrap_or_else(|e| panic!("{relative}: {e}"))
}

fn model(name: &str) -> ModelSpec {
    families::resolve(text(&format!("configs/models/{name}/config.json")).as_bytes()).unwrap().spec
}

fn plan(config: &str, model_name: &str, cluster: &str) -> ClusterPlan {
    let raw = file::read(&path(&format!("configs/{config}.toml"))).unwrap();
    let cluster = Cluster::read(&path(&format!("configs/clusters/{cluster}.toml"))).unwrap();
    ClusterPlan::new(&model(model_name), &raw, &cluster).unwrap()
}

#[test]
fn model_descriptions_have_the_published_sizes() {
    let parameters = |name| model(name).parameters().total();
    assert_eq!(parameters("mixtral-8x7b"), 46_702_792_704);
    assert_eq!(parameters("deepseek-v3"), 671_026_419_200);
}

#[test]
fn every_deployment_fits_the_cluster_it_is_for() {
    let shipped = fs::read_dir(path("configs"))
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    let mut deployments: Vec<_> =
        shipped.filter_map(|name| Some(name.strip_suffix(".toml")?.to_owned())).collect();
    // For any model and machine.
    deployments.retain(|name| !["expert-parallel", "reproducible"].contains(&name.as_str()));
    deployments.sort();
    // configuration, model, cluster, ranks, GB of weights per rank from below and above
    let expected = [
        ("deepseek-v3-h100x32", "deepseek-v3", "h100-4x8", 32, 55.0, 70.0),
        ("deepseek-v3-h200x16", "deepseek-v3", "h200-2x8", 16, 110.0, 120.0),
        ("mixtral-8x7b-cpu", "mixtral-8x7b", "cpu-2-sockets", 2, 46.0, 51.0),
        ("mixtral-8x7b-h100x2", "mixtral-8x7b", "h100-8", 2, 46.0, 48.0),
        ("mixtral-8x7b-h100x4", "mixtral-8x7b", "h100-8", 4, 23.0, 25.0),
        ("mixtral-8x7b-h100x8", "mixtral-8x7b", "h100-8", 8, 23.0, 25.0),
    ];
    assert_eq!(deployments, expected.map(|row| row.0), "a configuration without a row here");
    for (config, model, cluster, ranks, least, most) in expected {
        let plan = plan(config, model, cluster);
        assert_eq!((plan.ranks, plan.impossible.as_slice()), (ranks, &[][..]), "{config}:\n{plan}");
        let gigabytes = plan.footprint.weights as f64 / 1e9;
        assert!((least..most).contains(&gigabytes), "{config}: {gigabytes} GB of weights per rank\n{plan}");
        assert!(plan.full_sequences >= 1, "{config}:\n{plan}");
        let all = plan.footprint.weights + plan.footprint.working + plan.kv_bytes;
        assert!(all <= plan.device_bytes, "{config}:\n{plan}");
        assert!(
            text("docs/deploying.md").contains(&format!("`configs/{config}.toml`")),
            "{config} is not in docs/deploying.md"
        );
    }
}

#[test]
fn a_plan_says_what_is_missing_and_why() {
    let here = plan("mixtral-8x7b-cpu", "mixtral-8x7b", "cpu-2-sockets");
    assert!(here.runs_today(), "{here}");
    assert!(here.to_string().contains("runs today:         yes"), "{here}");

    let far = plan("deepseek-v3-h100x32", "deepseek-v3", "h100-4x8").to_string();
    for line in ["cluster:            h100-4x8: 32 of 32 devices on 4 nodes", "runs today:         no"] {
        assert!(far.lines().any(|l| l == line), "no line {line:?} in\n{far}");
    }
    assert!(far.contains("not yet:            all ranks live in one process so far"), "{far}");
    assert!(far.contains("untried:            32 ranks exchange rows by NCCL"), "{far}");
    let alone = RawOptions { max_model_len: Some(4096), ..RawOptions::default() };
    let b200 = Cluster::read(&path("configs/clusters/b200-8x8.toml")).unwrap();
    assert!(
        ClusterPlan::new(&model("mixtral-8x7b"), &alone, &b200).unwrap().runs_today(),
        "one GPU is enough"
    );
    assert!(far.contains("  extra slots:"), "{far}");

    let reasons = |raw: RawOptions, model_name: &str, cluster: &str| {
        let cluster = Cluster::read(&path(&format!("configs/clusters/{cluster}.toml"))).unwrap();
        ClusterPlan::new(&model(model_name), &raw, &cluster).unwrap().impossible.join("\n")
    };
    let ep = |ranks| RawOptions { expert_parallel_size: Some(ranks), ..RawOptions::default() };
    assert!(
        reasons(ep(16), "mixtral-8x7b", "h100-8")
            .contains("16 ranks need as many devices, the cluster has 8")
    );
    let full = reasons(ep(8), "deepseek-v3", "h100-8");
    assert!(full.contains("per rank exceed the 79.6 GiB of a device"), "{full}");
    let sized = RawOptions { kv_cache_memory: Some("70GiB".parse().unwrap()), ..ep(8) };
    assert!(reasons(sized, "mixtral-8x7b", "h100-8").contains("a KV cache of 70.0 GiB exceeds"));
    let small = RawOptions { kv_cache_memory: Some("1GiB".parse().unwrap()), ..ep(8) };
    assert!(reasons(small, "mixtral-8x7b", "h100-8").contains("fewer than one sequence of 32768"));
    let raw = file::read(&path("configs/mixtral-8x7b-cpu.toml")).unwrap();
    assert!(reasons(raw, "mixtral-8x7b", "h100-8").contains("another kind of device"));
}

/// Where the experts of each form run, and what they leave of a device.
#[test]
fn a_plan_knows_quantised_experts() {
    let plan = |quantize: Option<QuantizeChoice>, cluster: &str| {
        let cluster = Cluster::read(&path(&format!("configs/clusters/{cluster}.toml"))).unwrap();
        let raw = RawOptions { quantize, max_model_len: Some(4096), ..RawOptions::default() };
        ClusterPlan::new(&model("mixtral-8x7b"), &raw, &cluster).unwrap()
    };
    assert!(plan(None, "h100-8").to_string().contains("exceed the 79.6 GiB of a device"));
    for (choice, name, gigabytes) in
        [(QuantizeChoice::Fp8, "fp8", 48.3), (QuantizeChoice::Int4, "int4", 27.2)]
    {
        let one = plan(Some(choice), "h100-8");
        assert!(one.runs_today(), "{one}");
        let found = one.footprint.weights as f64 / 1e9;
        assert!((found - gigabytes).abs() < 0.1, "{name}: {found} GB");
        assert!(
            one.to_string().contains(&format!("{name} experts, which this version has run on no GPU")),
            "{one}"
        );
        let on_cpus = plan(Some(choice), "cpu-2-sockets").to_string();
        assert!(on_cpus.contains(&format!("{name} experts are computed on GPUs only")), "{on_cpus}");
    }
    let int8 = plan(Some(QuantizeChoice::Int8), "h100-8").to_string();
    assert!(int8.contains("int8 experts are computed on a CPU only"), "{int8}");
}

/// Names of metrics in a PromQL expression, and of recorded ratios.
fn names(expression: &str) -> Vec<&str> {
    let words = expression.split(|c: char| !c.is_alphanumeric() && c != '_' && c != ':');
    words.filter(|word| word.starts_with("moeyard") || word.starts_with("process_")).collect()
}

/// All `expr` and `expression`-like strings of a document.
fn expressions(document: &Value, found: &mut Vec<String>) {
    match document {
        Value::Object(map) => {
            for (key, value) in map {
                match value {
                    Value::String(text) if key == "expr" || key == "definition" => found.push(text.clone()),
                    other => expressions(other, found),
                }
            }
        }
        Value::Array(list) => list.iter().for_each(|value| expressions(value, found)),
        _ => {}
    }
}

fn yaml(relative: &str) -> Value {
    serde_saphyr::from_str(&text(relative)).unwrap_or_else(|e| panic!("{relative}: {e}"))
}

#[test]
fn what_dashboards_rules_and_alerts_ask_for_exists() {
    let mut known: Vec<String> = Vec::new();
    for family in FAMILIES {
        match family.kind {
            Kind::Histogram(_) => {
                known.extend(["_bucket", "_sum", "_count"].map(|suffix| format!("{}{suffix}", family.name)));
            }
            _ => known.push(family.name.to_owned()),
        }
    }
    let rules = yaml("configs/prometheus/rules.yml");
    let recorded = rules["groups"][0]["rules"].as_array().unwrap().iter();
    known.extend(recorded.map(|rule| rule["record"].as_str().unwrap().to_owned()));

    let dashboard: Value = serde_json::from_str(&text("configs/grafana/moeyard.json")).unwrap();
    let alerts = yaml("configs/prometheus/alerts.yml");
    let mut asked = Vec::new();
    for (name, document, least) in
        [("dashboard", &dashboard, 60), ("rules", &rules, 6), ("alerts", &alerts, 7)]
    {
        let mut found = Vec::new();
        expressions(document, &mut found);
        assert!(found.len() >= least, "{} expressions in {name}", found.len());
        for expression in &found {
            let names = names(expression);
            assert!(!names.is_empty(), "{name}: no metric in {expression}");
            for metric in names {
                assert!(
                    known.iter().any(|known| known == metric),
                    "{name} asks for {metric}, which is not there"
                );
            }
        }
        asked.extend(found);
    }
    let alert_names: Vec<_> = alerts["groups"][0]["rules"]
        .as_array()
        .unwrap()
        .iter()
        .map(|rule| rule["alert"].as_str().unwrap())
        .collect();
    for alert in ["RankDown", "ImbalanceHigh", "KVFull", "QueueGrowing", "CommShareHigh"] {
        assert!(alert_names.contains(&alert), "{alert} is not in {alert_names:?}");
    }
}

#[test]
fn panels_of_the_dashboard_neither_overlap_nor_lack_a_title() {
    let dashboard: Value = serde_json::from_str(&text("configs/grafana/moeyard.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    assert!(panels.len() > 30, "{} panels", panels.len());
    let place = |panel: &Value, key: &str| panel["gridPos"][key].as_u64().unwrap();
    let mut taken: BTreeMap<(u64, u64), u64> = BTreeMap::new();
    for panel in panels {
        let id = panel["id"].as_u64().unwrap();
        assert!(!panel["title"].as_str().unwrap().is_empty(), "panel {id}");
        let (x, y) = (place(panel, "x"), place(panel, "y"));
        assert!(x + place(panel, "w") <= 24, "panel {id} leaves the page");
        for cell in (x..x + place(panel, "w")).flat_map(|x| (y..y + place(panel, "h")).map(move |y| (x, y))) {
            if let Some(other) = taken.insert(cell, id) {
                panic!("panels {other} and {id} overlap at {cell:?}");
            }
        }
    }
}

#[test]
fn the_metrics_page_is_documented_in_full() {
    let documented = text("docs/metrics.md");
    for family in FAMILIES {
        let labels: Vec<_> = family.labels.iter().map(|label| format!("`{label}`")).collect();
        let kind = match family.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram(_) => "histogram",
        };
        let row = format!("| `{}` | {kind} | {} | {} |", family.name, labels.join(", "), family.help);
        assert!(documented.contains(&row), "docs/metrics.md lacks\n{row}");
    }
}

/// Runs promtool where it is installed; says so where it is not.
fn promtool(arguments: &[&str]) {
    match Command::new("promtool").current_dir(path("configs/prometheus")).args(arguments).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "promtool {arguments:?}: {said}");
        }
        Err(why) => {
            eprintln!("skipped: promtool {arguments:?}: {why} (Debian has it in the package prometheus)")
        }
    }
}

#[test]
fn prometheus_takes_the_rules_and_the_alerts_fire_when_they_should() {
    promtool(&["check", "config", "prometheus.yml"]);
    promtool(&["check", "rules", "rules.yml", "alerts.yml"]);
    promtool(&["test", "rules", "rules_test.yml"]);
}

/// The parts of Kubernetes' objects that the manifest uses, and no others: a misspelt field is an error here as it would be
/// for a strict API server. Names are those of the API (core/v1, apps/v1).
mod kubernetes {
    use super::*;

    #[derive(Deserialize)]
    #[serde(tag = "kind", deny_unknown_fields)]
    pub enum Object {
        ConfigMap {
            #[serde(rename = "apiVersion")]
            version: String,
            metadata: Metadata,
            data: BTreeMap<String, String>,
        },
        Deployment {
            #[serde(rename = "apiVersion")]
            version: String,
            metadata: Metadata,
            spec: Box<DeploymentSpec>,
        },
        Service {
            #[serde(rename = "apiVersion")]
            version: String,
            metadata: Metadata,
            spec: ServiceSpec,
        },
    }

    macro_rules! object {
        ($($name:ident { $($field:ident: $kind:ty),* $(,)? })*) => {
            $(
                #[derive(Deserialize)]
                #[serde(rename_all = "camelCase", deny_unknown_fields)]
                #[allow(dead_code, reason = "being read is the check")]
                pub struct $name { $(pub $field: $kind),* }
            )*
        };
    }

    object! {
        Metadata { name: Option<String>, labels: BTreeMap<String, String>, annotations: Option<BTreeMap<String, String>> }
        DeploymentSpec { replicas: u32, strategy: Strategy, selector: Selector, template: Template }
        Strategy { r#type: String }
        Selector { match_labels: BTreeMap<String, String> }
        Template { metadata: Metadata, spec: PodSpec }
        PodSpec {
            termination_grace_period_seconds: u64,
            security_context: PodSecurity,
            containers: Vec<Container>,
            volumes: Vec<Volume>,
        }
        PodSecurity { run_as_non_root: bool, run_as_user: u32, fs_group: u32, seccomp_profile: Strategy }
        Container {
            name: String,
            image: String,
            args: Vec<String>,
            env: Vec<Variable>,
            ports: Vec<ContainerPort>,
            startup_probe: Probe,
            readiness_probe: Probe,
            liveness_probe: Probe,
            resources: Resources,
            security_context: Security,
            volume_mounts: Vec<Mount>,
        }
        Variable { name: String, value_from: VariableSource }
        VariableSource { secret_key_ref: SecretKey }
        SecretKey { name: String, key: String }
        ContainerPort { name: String, container_port: u16 }
        Probe { http_get: HttpGet, period_seconds: u32, failure_threshold: Option<u32> }
        HttpGet { path: String, port: String }
        Resources { requests: BTreeMap<String, String>, limits: BTreeMap<String, String> }
        Security { allow_privilege_escalation: bool, read_only_root_filesystem: bool, capabilities: Capabilities }
        Capabilities { drop: Vec<String> }
        Mount { name: String, mount_path: String, read_only: bool }
        Volume { name: String, config_map: Option<Named>, persistent_volume_claim: Option<Claim> }
        Named { name: String }
        Claim { claim_name: String, read_only: bool }
        ServiceSpec { selector: BTreeMap<String, String>, ports: Vec<ServicePort> }
        ServicePort { name: String, port: u16, target_port: String }
    }
}

#[test]
fn the_kubernetes_manifest_fits_its_schema_and_itself() {
    let manifest = text("configs/deploy/kubernetes.yaml");
    let objects: Vec<kubernetes::Object> = manifest
        .split("\n---\n")
        .map(|part| serde_saphyr::from_str(part).unwrap_or_else(|e| panic!("{e}\n{part}")))
        .collect();
    let [
        kubernetes::Object::ConfigMap { version: v1, metadata: map, data },
        kubernetes::Object::Deployment { version: apps, metadata: deployment, spec },
        kubernetes::Object::Service { version: service_version, metadata: front, spec: service },
    ] = objects.as_slice()
    else {
        panic!("other objects than a ConfigMap, a Deployment and a Service");
    };
    assert_eq!((v1.as_str(), apps.as_str(), service_version.as_str()), ("v1", "apps/v1", "v1"));

    assert!([deployment, front].iter().all(|other| other.name == map.name && other.labels == map.labels));
    let options = file::parse(&data["moeyard.toml"], "moeyard.toml").unwrap();
    let pod = &spec.template.spec;
    let container = &pod.containers[0];
    // The process is given its drain, and some seconds more.
    assert!(pod.termination_grace_period_seconds > options.drain_timeout.unwrap() + 5);
    assert_eq!(spec.selector.match_labels, spec.template.metadata.labels);
    assert_eq!(service.selector, spec.template.metadata.labels);
    assert_eq!(container.ports[0].container_port, options.port.unwrap());
    assert_eq!(options.host.as_deref(), Some("0.0.0.0"), "a loopback address is unreachable in a pod");
    assert_eq!(service.ports[0].target_port, container.ports[0].name);
    for (probe, route) in [
        (&container.startup_probe, "/readyz"),
        (&container.readiness_probe, "/readyz"),
        (&container.liveness_probe, "/health"),
    ] {
        assert_eq!((probe.http_get.path.as_str(), &probe.http_get.port), (route, &container.ports[0].name));
    }
    let mounted = |mount: &kubernetes::Mount| pod.volumes.iter().any(|volume| volume.name == mount.name);
    assert!(container.volume_mounts.iter().all(mounted));
    let config = container.volume_mounts.iter().find(|mount| mount.name == "config").unwrap();
    let source = pod.volumes.iter().find_map(|volume| volume.config_map.as_ref()).unwrap();
    assert_eq!(Some(&source.name), map.name.as_ref());
    assert_eq!(
        container.args,
        ["serve", "/models/model", "--config", &format!("{}/moeyard.toml", config.mount_path)]
    );
}

#[test]
fn the_unit_gives_the_process_time_to_drain_and_never_retries_what_cannot_run() {
    let unit = text("configs/deploy/moeyard.service");
    let setting = |key: &str| {
        let line = unit.lines().find_map(|line| line.strip_prefix(&format!("{key}=")));
        line.unwrap_or_else(|| panic!("{key} is not in the unit")).to_owned()
    };
    assert!(setting("TimeoutStopSec").parse::<u64>().unwrap() > 30 + 5, "longer than the default drain");
    assert_eq!(
        (setting("KillSignal").as_str(), setting("RestartPreventExitStatus").as_str()),
        ("SIGTERM", "2")
    );
    assert!(setting("ExecStart").starts_with("/usr/local/bin/moeyard serve "));
    assert!(text("configs/deploy/moeyard.env").contains("\nMOEYARD_API_KEY="));
    assert!(text("configs/deploy/Containerfile").contains("\nENTRYPOINT [\"/usr/local/bin/moeyard\"]\n"));
}
