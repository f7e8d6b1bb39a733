"""The verbs: one module each, one public function each. They walk through the nouns once; no click in them."""
