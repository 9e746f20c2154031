//! Cases of random shape, for `proptest` to drive or a seed to draw.

use ampoule_plan::{DType, RopeStyle};

use super::build::{Layout, Tokens};
use super::list::{MATRIX, PAIRS};
use super::rng::Rng;
use super::rows::{Common, EmbedCase, LastRowCase, LinearCase, RopeCase, Unary, UnaryCase};
use super::sampling::{Logits, SampleCase};
use super::sequence::{AttentionCase, ConvCase, DeltaCase};
use super::spec::Spec;
use super::words::{CopyCase, CountsCase};

/// Numbers that choose a case. Any numbers choose one: each is reduced to the range it needs, and smaller numbers
/// mean a smaller case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Which op.
    pub op: usize,
    /// Valid token rows.
    pub rows: usize,
    /// Rows of the bucket past the valid ones.
    pub spare: usize,
    /// Sizes: widths, heads, taps, vocabulary, as the op needs.
    pub sizes: [usize; 3],
    /// The position.
    pub position: usize,
    /// Element types, layout and flags.
    pub variant: usize,
}

impl Choice {
    /// A choice drawn from a seed.
    pub fn drawn(seed: u64, index: usize) -> Self {
        let mut rng = Rng::new(seed, &format!("choice {index}"));
        let mut word = || rng.word() as usize;
        Self {
            op: word(),
            rows: word(),
            spare: word(),
            sizes: [word(), word(), word()],
            position: word(),
            variant: word(),
        }
    }

    /// The case. Its name tells all about it, so the name in a failure is enough to run it again.
    pub fn spec(&self) -> Spec {
        let mut variant = self.variant;
        let mut take = |n: usize| {
            let digit = variant % n;
            variant /= n;
            digit
        };
        let rows = 1 + self.rows % 40;
        let tokens = match self.spare % 20 {
            0 => Tokens::All(rows),
            spare => Tokens::Of { rows, bucket: rows + spare - 1 },
        };
        let (x, out) = PAIRS[take(4)]; // float32 and bfloat16
        let layout = Layout::ALL[take(3)];
        let weight = MATRIX[take(6)];
        let (flag, other) = (take(2) == 1, take(2) == 1);
        let size = |i: usize, n: usize| 1 + self.sizes[i] % n;
        let common = Common { tokens, x, out, layout };
        let blocks = |n: usize| if weight.is_quantized() { n.next_multiple_of(32) } else { n };
        match self.op % 12 {
            0 | 1 => {
                let (k, n) = (blocks(size(0, 400)), size(1, 200));
                Spec::new(LinearCase { common, weight, k, n, bias: flag, add: other })
            }
            2 => {
                let (vocabulary, width) = (size(0, 500), blocks(size(1, 100)));
                let common = Common { x: DType::I32, ..common };
                Spec::new(EmbedCase { common, table: weight, vocabulary, width, recipe: false })
            }
            3 | 4 => {
                let op = match size(2, 5) {
                    1 => Unary::RmsNorm { centered: false },
                    2 => Unary::RmsNorm { centered: true },
                    3 => Unary::GatedRmsNorm,
                    4 => Unary::SigmoidGate,
                    _ => Unary::SwiGlu,
                };
                let in_place = flag && op != Unary::SwiGlu;
                let common = if in_place { Common { out: x, ..common } } else { common };
                let (groups, width) = (size(0, 6), size(1, 200));
                Spec::new(UnaryCase { common, op, groups, width, in_place, wide: other })
            }
            5 => {
                let head_dim = 2 * size(0, 64);
                let frequencies = 1 + self.sizes[1] % (head_dim / 2);
                let style = if flag { RopeStyle::Half } else { RopeStyle::Interleaved };
                let (heads, position) = (size(2, 6), self.position % 10_000);
                Spec::new(RopeCase {
                    tokens,
                    dtype: x,
                    layout,
                    heads,
                    head_dim,
                    frequencies,
                    style,
                    position,
                })
            }
            6 | 7 => Spec::new(AttentionCase {
                tokens,
                x,
                cache: [DType::F32, DType::BF16, DType::F16][take(3)],
                out,
                layout,
                kv_heads: size(0, 3),
                share: size(1, 8),
                head_dim: [8, 16, 24, 32, 64, 128][self.sizes[2] % 6],
                position: self.position % 300,
                append_only: false,
            }),
            8 => {
                let (channels, taps) = (size(0, 200), 2 + self.sizes[1] % 3);
                Spec::new(ConvCase { tokens, x, out, layout, channels, taps, bias: flag })
            }
            9 => {
                let (key_heads, share) = (size(0, 3), 1 + self.position % 3);
                let value_heads = key_heads * share;
                let (key_dim, value_dim) = (8 * size(1, 8), 8 * size(2, 8));
                Spec::new(DeltaCase {
                    tokens,
                    x,
                    out,
                    layout,
                    key_heads,
                    value_heads,
                    key_dim,
                    value_dim,
                })
            }
            10 => {
                let params = [
                    [0.0, 0.5, 1.0, 1.7][take(4)],
                    [0.0, 1.0, 30.0][take(3)],
                    [1.0, 0.9, 0.4][take(3)],
                    [0.0, 0.05][take(2)],
                    [1.0, 1.2][take(2)],
                    [0.0, 0.5][take(2)],
                    [0.0, 0.2][take(2)],
                    0.0,
                ];
                let logits = [Logits::Plain, Logits::Tied, Logits::Peaked, Logits::Broken][take(4)];
                let (vocabulary, bias) = (1 + size(0, 3000), self.sizes[1] % 20);
                Spec::new(SampleCase { vocabulary, params, logits, bias, forced: false, draws: 3 })
            }
            _ => match size(2, 3) {
                1 => Spec::new(LastRowCase { common, width: size(0, 300) }),
                2 => {
                    let vocabulary = 4 + size(0, 2000);
                    Spec::new(CountsCase { tokens, vocabulary, begin: false, layout })
                }
                _ => {
                    let (width, to) = (size(0, 300), Layout::ALL[take(3)]);
                    Spec::new(CopyCase {
                        tokens,
                        dtype: x,
                        from: layout,
                        to,
                        width,
                        to_state: false,
                    })
                }
            },
        }
    }
}
