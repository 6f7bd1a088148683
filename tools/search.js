// Search for the site: every word of the query must occur, and the title counts more than the text. Exact and without word boundaries,
// so that it finds a Chinese word inside a sentence as well as a name of the API. smalldocs looks for a class of this name and form.
window.Fuse = class {
  constructor(entries) {
    this.entries = entries.map((entry) => ({ item: entry, fields: ["title", "section", "text"].map((key) => (entry[key] || "").toLowerCase()) }));
  }
  search(query, { limit = 20 } = {}) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    const points = (fields, word) => {
      const weights = fields.map((text, i) => (text === word ? 8 : 1) * (text.includes(word) ? [4, 6, 1][i] : 0));
      return weights.reduce((a, b) => a + b, 0);
    };
    const hits = this.entries.map(({ item, fields }) => ({ item, scores: words.map((word) => points(fields, word)) }));
    return hits.filter(({ scores }) => scores.every((score) => score > 0))
      .map(({ item, scores }) => ({ item, score: scores.reduce((a, b) => a + b, 0) }))
      .sort((a, b) => b.score - a.score).slice(0, limit);
  }
};
