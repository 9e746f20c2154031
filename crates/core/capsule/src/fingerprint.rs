//! What must be equal for a capsule to fit a model.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Digest;

/// The named parts of a [`Fingerprint`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Component {
    /// The weight bytes.
    Weights,
    /// The plans: ops, buffers, shape keys.
    Plan,
    /// Names, dtypes and shapes of the state tensors.
    Layout,
    /// Kernel sources and library versions.
    Kernels,
    /// The device class and instruction-set path.
    Device,
}

impl Component {
    /// Every component, in the order in which a digest takes them.
    pub const ALL: [Self; 5] =
        [Self::Weights, Self::Plan, Self::Layout, Self::Kernels, Self::Device];

    /// Every component, in the order in which they are compared: the first one that differs is the most useful to name.
    /// Another model also has another plan and layout, and another device other kernels, and often another precision and
    /// so another plan and layout.
    pub const COMPARED: [Self; 5] =
        [Self::Weights, Self::Device, Self::Plan, Self::Layout, Self::Kernels];

    /// The name used in manifests and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Plan => "plan",
            Self::Layout => "layout",
            Self::Kernels => "kernels",
            Self::Device => "device",
        }
    }

    const fn advice(self) -> &'static str {
        match self {
            Self::Weights => "load the weights that the capsule was made with, or prefill again",
            Self::Plan => {
                "run the model version and settings that the capsule was made with, or prefill again"
            }
            Self::Layout => {
                "use the context length and state types that the capsule was made with, or prefill again"
            }
            Self::Kernels => {
                "run the Ampoule build that the capsule was made with, or prefill again"
            }
            Self::Device => {
                "restore on the device class that the capsule was made on, or prefill again"
            }
        }
    }
}

impl fmt::Display for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One short human sentence part for each component, such as `cpu x86_64` for the device.
///
/// Labels are for messages only: they take no part in [`Fingerprint::digest`] and
/// [`Fingerprint::ensure_matches`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Labels {
    /// Says which weights, such as a file name.
    pub weights: String,
    /// Says which plan, such as a model family and its context length.
    pub plan: String,
    /// Says which kernels, such as `ampoule-cpu 0.1.0`.
    pub kernels: String,
    /// Says which device class, such as `cpu x86_64`.
    pub device: String,
    /// Says which layout, such as `f32 KV cache, 4096 rows`.
    pub layout: String,
}

/// The identity of everything that gives state bytes their meaning.
///
/// `==` compares labels too; whether a capsule fits is [`ensure_matches`](Self::ensure_matches).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// Digest of the weights.
    pub weights: Digest,
    /// Digest of the plans.
    pub plan: Digest,
    /// Digest of kernel sources and library versions.
    pub kernels: Digest,
    /// Digest of the device class and instruction-set path.
    pub device: Digest,
    /// [`StateLayout::digest`](crate::StateLayout::digest) of the state tensors.
    pub layout: Digest,
    /// Human labels, one a component.
    pub labels: Labels,
}

impl Fingerprint {
    /// The digest of one component.
    pub const fn component(&self, component: Component) -> Digest {
        match component {
            Component::Weights => self.weights,
            Component::Plan => self.plan,
            Component::Layout => self.layout,
            Component::Kernels => self.kernels,
            Component::Device => self.device,
        }
    }

    /// The label of one component.
    pub fn label(&self, component: Component) -> &str {
        match component {
            Component::Weights => &self.labels.weights,
            Component::Plan => &self.labels.plan,
            Component::Layout => &self.labels.layout,
            Component::Kernels => &self.labels.kernels,
            Component::Device => &self.labels.device,
        }
    }

    /// One digest over the five components, in the order of [`Component::ALL`]; labels are left out.
    pub fn digest(&self) -> Digest {
        let mut hasher = blake3::Hasher::new_derive_key("ampoule capsule v1 fingerprint");
        for component in Component::ALL {
            hasher.update(self.component(component).as_bytes());
        }
        hasher.finalize().into()
    }

    /// Checks that a capsule with the fingerprint `self` fits where `other` is the fingerprint of the
    /// running model.
    ///
    /// # Errors
    ///
    /// [`FingerprintMismatch`] with the first component of [`Component::COMPARED`] that differs.
    pub fn ensure_matches(&self, other: &Self) -> Result<(), FingerprintMismatch> {
        match Component::COMPARED.into_iter().find(|&c| self.component(c) != other.component(c)) {
            None => Ok(()),
            Some(component) => Err(FingerprintMismatch {
                component,
                capsule: self.component(component),
                capsule_label: self.label(component).to_owned(),
                running: other.component(component),
                running_label: other.label(component).to_owned(),
            }),
        }
    }
}

/// A capsule was made by something other than what runs here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FingerprintMismatch {
    /// The first component that differs.
    pub component: Component,
    /// The capsule's digest of it.
    pub capsule: Digest,
    /// The capsule's label of it.
    pub capsule_label: String,
    /// The running model's digest of it.
    pub running: Digest,
    /// The running model's label of it.
    pub running_label: String,
}

impl fmt::Display for FingerprintMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let short = |digest: &Digest| digest.to_string()[..12].to_owned();
        write!(
            f,
            "the capsule's {} do{} not match: it was made with '{}' ({}), here runs '{}' ({}); {}",
            self.component,
            if matches!(self.component, Component::Weights | Component::Kernels) {
                ""
            } else {
                "es"
            },
            self.capsule_label,
            short(&self.capsule),
            self.running_label,
            short(&self.running),
            self.component.advice(),
        )
    }
}

impl std::error::Error for FingerprintMismatch {}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Fingerprint {
        Fingerprint {
            weights: Digest::of(b"w"),
            plan: Digest::of(b"p"),
            kernels: Digest::of(b"k"),
            device: Digest::of(b"d"),
            layout: Digest::of(b"l"),
            labels: Labels { device: "cpu x86_64".into(), ..Labels::default() },
        }
    }

    #[test]
    fn the_first_difference_is_named() {
        let ours = sample();
        assert_eq!(ours.ensure_matches(&ours), Ok(()));
        let mut theirs = ours.clone();
        let mut expected = Vec::new();
        // From the least to the most useful one to name.
        for component in [
            Component::Kernels,
            Component::Layout,
            Component::Plan,
            Component::Device,
            Component::Weights,
        ] {
            let field = match component {
                Component::Weights => &mut theirs.weights,
                Component::Plan => &mut theirs.plan,
                Component::Layout => &mut theirs.layout,
                Component::Kernels => &mut theirs.kernels,
                Component::Device => &mut theirs.device,
            };
            *field = Digest::of(b"other");
            let error = ours.ensure_matches(&theirs).unwrap_err();
            assert_eq!(error.component, component);
            assert_ne!(ours.digest(), theirs.digest());
            expected.push(theirs.digest());
        }
        expected.dedup();
        assert_eq!(expected.len(), 5);
    }

    #[test]
    fn the_message_names_both_labels_and_says_what_to_do() {
        let ours = sample();
        let mut theirs = ours.clone();
        theirs.device = Digest::of(b"x");
        theirs.labels.device = "cuda sm_90".into();
        let text = ours.ensure_matches(&theirs).unwrap_err().to_string();
        for part in ["device does not match", "'cpu x86_64'", "'cuda sm_90'", "prefill again"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn labels_take_no_part_in_identity() {
        let ours = sample();
        let mut theirs = ours.clone();
        theirs.labels.weights = "renamed.gguf".into();
        assert_eq!(ours.ensure_matches(&theirs), Ok(()));
        assert_eq!(ours.digest(), theirs.digest());
    }
}
