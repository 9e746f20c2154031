//! Automatic capsules: for each namespace a trie of the tokens of prompts, with a boundary at some of its nodes.
//!
//! A lookup walks the trie along a prompt and knows the deepest boundary on the way, in whatever branch it was taken, and
//! where the prompt leaves what was ever read: there two prompts diverge, and a boundary is worth taking. Namespaces share
//! nothing, not even the walk: how long a lookup takes depends on the caller's own prompts alone.

use std::collections::{BTreeMap, HashMap};

use ampoule::Capsule;

/// Who may share: a digest of API key and cache key.
pub(crate) type Space = [u8; 32];

struct Node {
    parent: usize,
    /// Tokens from the parent to here; empty only at the root.
    edge: Vec<u32>,
    /// By the first token of the edge.
    children: HashMap<u32, usize>,
    boundary: Option<Boundary>,
}

struct Boundary {
    capsule: Capsule,
    used: u64,
}

struct Trie {
    nodes: Vec<Option<Node>>,
    vacant: Vec<usize>,
}

impl Default for Trie {
    fn default() -> Self {
        let root = Node { parent: 0, edge: Vec::new(), children: HashMap::new(), boundary: None };
        Self { nodes: vec![Some(root)], vacant: Vec::new() }
    }
}

impl Trie {
    fn node(&self, index: usize) -> &Node {
        self.nodes[index].as_ref().expect("indices of a trie are of its nodes")
    }

    fn node_mut(&mut self, index: usize) -> &mut Node {
        self.nodes[index].as_mut().expect("indices of a trie are of its nodes")
    }

    fn add(&mut self, node: Node) -> usize {
        if let Some(index) = self.vacant.pop() {
            self.nodes[index] = Some(node);
            return index;
        }
        self.nodes.push(Some(node));
        self.nodes.len() - 1
    }

    /// The deepest node with a boundary, and how many tokens are known.
    fn walk(&self, tokens: &[u32]) -> (Option<usize>, usize) {
        let (mut at, mut here, mut found) = (0, 0, None);
        loop {
            let node = self.node(here);
            if node.boundary.is_some() {
                found = Some(here);
            }
            let Some(&next) = tokens.get(at).and_then(|token| node.children.get(token)) else {
                return (found, at);
            };
            let edge = &self.node(next).edge;
            let same = edge.iter().zip(&tokens[at..]).take_while(|(a, b)| a == b).count();
            at += same;
            if same < edge.len() {
                return (found, at);
            }
            here = next;
        }
    }

    /// The node of exactly these tokens, made where there is none.
    fn insert(&mut self, tokens: &[u32]) -> usize {
        let (mut at, mut here) = (0, 0);
        while at < tokens.len() {
            let Some(&next) = self.node(here).children.get(&tokens[at]) else {
                let edge = tokens[at..].to_vec();
                let leaf = Node { parent: here, edge, children: HashMap::new(), boundary: None };
                let leaf = self.add(leaf);
                self.node_mut(here).children.insert(tokens[at], leaf);
                return leaf;
            };
            let edge = &self.node(next).edge;
            let same = edge.iter().zip(&tokens[at..]).take_while(|(a, b)| a == b).count();
            if same < edge.len() {
                let (before, after) = (edge[..same].to_vec(), edge[same..].to_vec());
                let children = HashMap::from([(after[0], next)]);
                let middle = Node { parent: here, edge: before, children, boundary: None };
                let middle = self.add(middle);
                self.node_mut(here).children.insert(tokens[at], middle);
                let below = self.node_mut(next);
                (below.parent, below.edge) = (middle, after);
                here = middle;
            } else {
                here = next;
            }
            at += same;
        }
        here
    }

    /// Removes nodes that lead to no boundary.
    fn prune(&mut self, mut index: usize) {
        while index != 0 {
            let node = self.node(index);
            if node.boundary.is_some() || !node.children.is_empty() {
                return;
            }
            let (parent, first) = (node.parent, node.edge[0]);
            self.nodes[index] = None;
            self.vacant.push(index);
            self.node_mut(parent).children.remove(&first);
            index = parent;
        }
    }
}

/// What is known of a prompt.
pub(crate) struct Match {
    /// The deepest boundary that is a prefix of it.
    pub capsule: Option<Capsule>,
    /// How many of its tokens were read before, in this order, by whatever prompt.
    pub common: usize,
    /// Whether it begins with all that was read in its branch, and a boundary is there.
    pub continues: bool,
}

/// All boundaries that are kept without anybody having asked.
#[derive(Default)]
pub(crate) struct Cache {
    spaces: HashMap<Space, Trie>,
    /// Oldest use first.
    order: BTreeMap<u64, (Space, usize)>,
    clock: u64,
}

impl Cache {
    /// How many boundaries there are.
    pub(crate) fn len(&self) -> usize {
        self.order.len()
    }

    fn touch(&mut self, space: &Space, index: usize) {
        self.clock += 1;
        let Some(trie) = self.spaces.get_mut(space) else { return };
        if let Some(boundary) = &mut trie.node_mut(index).boundary {
            self.order.remove(&boundary.used);
            boundary.used = self.clock;
            self.order.insert(self.clock, (*space, index));
        }
    }

    pub(crate) fn find(&mut self, space: &Space, tokens: &[u32]) -> Match {
        let Some(trie) = self.spaces.get(space) else {
            return Match { capsule: None, common: 0, continues: false };
        };
        let (found, common) = trie.walk(tokens);
        let leaf = found.filter(|&i| i != 0 && trie.node(i).children.is_empty());
        let capsule = found.and_then(|i| trie.node(i).boundary.as_ref().map(|b| b.capsule.clone()));
        if let Some(index) = found {
            self.touch(space, index);
        }
        let continues =
            leaf.is_some() && capsule.as_ref().is_some_and(|c| c.position() as usize == common);
        Match { capsule, common, continues }
    }

    /// Keeps a boundary whose tokens are `tokens`. One that is there already stays.
    pub(crate) fn keep(&mut self, space: &Space, tokens: &[u32], capsule: Capsule) {
        debug_assert!(capsule.tokens() == tokens, "a boundary is found by its own tokens");
        let trie = self.spaces.entry(*space).or_default();
        let index = trie.insert(tokens);
        let node = trie.node_mut(index);
        if node.boundary.is_none() {
            self.clock += 1;
            node.boundary = Some(Boundary { capsule, used: self.clock });
            self.order.insert(self.clock, (*space, index));
        } else {
            self.touch(space, index);
        }
    }

    /// Drops the boundary that was not used for the longest time; false if there is none.
    pub(crate) fn evict(&mut self) -> bool {
        let Some((_, (space, index))) = self.order.pop_first() else { return false };
        if let Some(trie) = self.spaces.get_mut(&space) {
            trie.node_mut(index).boundary = None;
            trie.prune(index);
            if trie.node(0).children.is_empty() && trie.node(0).boundary.is_none() {
                self.spaces.remove(&space);
            }
        }
        true
    }

    /// The boundaries used last, latest first.
    pub(crate) fn latest(&self, most: usize) -> Vec<(Space, Capsule)> {
        let capsule = |(space, index): &(Space, usize)| {
            let boundary = self.spaces.get(space)?.node(*index).boundary.as_ref()?;
            Some((*space, boundary.capsule.clone()))
        };
        self.order.values().rev().filter_map(capsule).take(most).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ampoule::{Ampoule, Device, LoadOptions};

    /// Capsules of every prefix of some branches, found against a plain list of them.
    #[test]
    fn lookups_agree_with_a_list_of_prefixes() {
        let options = LoadOptions { device: Device::Cpu, context: 64, ..LoadOptions::default() };
        let mut model = Ampoule::load("random:qwen3.5-tiny", &options, &mut |_, _| {}).unwrap();
        let mut dice = 7_u64;
        let mut next = |n: u64| {
            dice = dice
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (dice >> 33) % n
        };
        let (mut cache, space, other) = (Cache::default(), [1; 32], [2; 32]);
        let mut list: Vec<Vec<u32>> = Vec::new();
        for round in 0..300 {
            let len = 1 + next(9) as usize;
            let tokens: Vec<u32> = (0..len).map(|_| next(2) as u32).collect();
            let known = list.iter().filter(|l| tokens.starts_with(l)).map(Vec::len).max();
            let shared = |l: &Vec<u32>| l.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
            let common = list.iter().map(shared).max().unwrap_or(0);
            let found = cache.find(&space, &tokens);
            assert_eq!(found.capsule.as_ref().map(|c| c.position() as usize), known, "{tokens:?}");
            assert_eq!(found.common, common, "{tokens:?} {list:?}");
            if let Some(capsule) = found.capsule {
                assert!(tokens.starts_with(&capsule.tokens()));
                let position = list.iter().position(|l| *l == capsule.tokens()).unwrap();
                let used = list.remove(position);
                list.push(used);
            }
            assert!(cache.find(&other, &tokens).capsule.is_none());
            if round % 3 == 0 {
                let slot = model.slot_with(&tokens).unwrap();
                let capsule = model.engine.snapshot(slot).unwrap();
                model.engine.drop_slot(slot).unwrap();
                cache.keep(&space, &tokens, capsule);
                list.retain(|l| *l != tokens);
                list.push(tokens);
            } else if round % 4 == 0 && !list.is_empty() {
                assert!(cache.evict());
                list.remove(0);
            }
            assert_eq!(cache.len(), list.len());
        }
        while cache.evict() {}
        assert!(cache.spaces.is_empty() && model.engine.capsule_bytes().0 == 0);
    }
}
